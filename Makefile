.PHONY: dev test interpret sanitize fuzz endurance bench style wheel

dev:        ## editable install with everything that tests need
	pip install -e '.[test]'

test:       ## all tests that can run on this machine
	pytest

interpret:  ## the Triton kernels, run by Triton's interpreter on the CPU
	TRITON_INTERPRET=1 pytest tests/kernels -k triton

# Python's allocator and torch's caches end unfreed, hence no leaks; a report ends the process, so it must not be captured.
sanitize:   ## the C++ operators under AddressSanitizer and UBSan, in a build of their own below build/sanitize
	ICF_SANITIZE=1 ICF_CUDA=0 pip install -q --no-deps --no-build-isolation --upgrade --target build/sanitize .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" PYTHONPATH=build/sanitize \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	python -m pytest tests/kernels --capture=sys -k "not triton and not cuda and not compiles"

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
