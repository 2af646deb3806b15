"""The measured promises: what the write path must reach, as ratios against peers on the same machine.

`make bench` runs all of it and writes RESULTS.md; `python -m ops.bench committer` runs one part. A ratio
counts only between figures of one run, taken in turns: the machine and its disk change by the hour. Nothing
here is imported by anything else.
"""
