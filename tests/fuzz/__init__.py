"""The project's mutation suite: `make fuzz N=60000`, or `python -m tests.fuzz N SEED [CLASS ...]`.

Seeds are files and requests that are right, and every past finding; cases are mutations of them.
"""
