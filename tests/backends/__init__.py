"""Real inference servers on the CPU, each installed into a folder of its own, and both suites run against them.

python -m tests.backends                  all of them: what `make test-backends` does
python -m tests.backends vllm triton      some
"""
