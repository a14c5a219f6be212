"""What `bench.py` compares: the same meta-gradients, each written in the idiom of one library.

A contender is a function `comparison(problem, **options)` that builds everything and returns `run`;
`run()` computes once and returns name -> array. One file a library, so that a library that is not
installed only drops out.
"""
