"""The GPU benchmarks: models, contenders, timing, and the tables and plots made of the results."""
