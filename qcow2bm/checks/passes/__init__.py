"""The passes of a check, one file each, run in the order of `runner.PASSES`.

A pass is a generator of findings over the view. It never prints, prompts, counts or repairs.
"""
