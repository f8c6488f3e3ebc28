"""The queue between a stream and one subscriber: policies, bounded, keyed, and its idle timer.

`subscribers` offers what is here to the streams.
"""
