"""The sides of `benchmarks.towers`: each module runs in the environment of its program."""
