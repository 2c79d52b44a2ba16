"""The passes of a check, run in the order of `runner.OPENING`, `CHECKING` and `BEYOND`.

A pass is a generator of findings over the view. It never prints, prompts, counts or repairs, and knows no other pass:
what one leaves for those after it are attributes of the view. What follows from that for the order:

- the snapshot table comes before the mapping, which walks the snapshots' L1 tables and begins the census;
- everything that takes clusters is counted before the refcount blocks, which are told to be shared if they count
  already, and those before the comparison of the refcounts;
- the comparison leaves the leaks to the pass that names them, the mapping the tables whose copied flags are wrong;
- what hides clusters, or could not be read, has been said before the comparison: it decides what a leak is called.
"""
