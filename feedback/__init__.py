"""AI feedback: sample candidates, judge them, measure the judge, write preference shards.

Importing this package loads neither torch nor vllm.
"""
