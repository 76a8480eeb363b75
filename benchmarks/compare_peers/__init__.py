"""One module for each program that `benchmarks.compare` measures; each runs in the program's own
environment, so that none of them may import edgevlm (but ours) or another program.
"""
