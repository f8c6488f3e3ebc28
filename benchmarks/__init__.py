"""Measures this library beside plain Python and beside the libraries people use today.

`python -m benchmarks` prints one Markdown table. Each line of work is done by a floor written in
plain Python, by its best peers and by ours: in one process, on one core, in turns.
"""
