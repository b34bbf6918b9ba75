.PHONY: dev test interpret bench style wheel

dev:        ## editable install with everything that tests need
	pip install -e '.[test]'

test:       ## all tests that can run on this machine
	pytest

interpret:  ## the Triton kernels, run by Triton's interpreter on the CPU
	TRITON_INTERPRET=1 pytest tests/kernels

bench:      ## operators and metrics on every backend that can run
	pytest benchmarks/ --benchmark-only

style:      ## what CI checks besides the tests
	ruff check .

wheel:      ## one wheel for every Python, into dist/
	pip wheel --no-deps -w dist .
