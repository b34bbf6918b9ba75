.PHONY: dev test interpret emulate sanitize fuzz endurance bench style wheel

dev:        ## editable install with everything that tests need
	pip install -e '.[test]'

test:       ## all tests that can run on this machine
	pytest

interpret:  ## the Triton kernels, run by Triton's interpreter on the CPU
	TRITON_INTERPRET=1 pytest tests/kernels -k triton

emulate:    ## the CUDA kernels, emulated on the CPU, in a build of their own below build/emulated
	ICF_EMULATE=1 pip install -q --no-deps --no-build-isolation --upgrade --target build/emulated .
	PYTHONPATH=build/emulated python -m pytest tests/kernels -k "cuda and not triton and not compiles or fuzz"

# Leaks are left out, as the allocators of Python and torch free nothing in the end. A report ends the process, so it must
# not be captured. What is chosen automatically (test_backend) is another thing where CUDA is emulated.
sanitize:   ## the C++ and emulated CUDA operators under AddressSanitizer and UBSan, in a build below build/sanitize
	ICF_SANITIZE=1 ICF_EMULATE=1 pip install -q --no-deps --no-build-isolation --upgrade --target build/sanitize .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" PYTHONPATH=build/sanitize \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	python -m pytest tests/kernels --capture=sys -k "not triton and not compiles and not test_backend"

fuzz:       ## 10,000 inputs of each operator, and as many files for each reader
	pytest tests/kernels/test_fuzz.py tests/data/test_fuzz.py --hypothesis-profile=long

endurance:  ## MINUTES (30) of training that is killed, starved and stopped in every way, and loses nothing
	python tests/endurance.py $(MINUTES)

bench:      ## operators and metrics on every backend that can run
	pytest benchmarks/ --benchmark-only

style:      ## what CI checks besides the tests
	ruff check .

wheel:      ## one wheel for every Python, into dist/
	pip wheel --no-deps -w dist .
