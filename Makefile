# make demo   set up, convert SmolLM2-135M, generate text, compare with Q4_0
# make test   set up, native tests, test suite          make lint   ruff, mypy, clang-format
# make test-arm   kernels under qemu-user (Debian: gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user)
# make fuzz   a minute of native code, readers and loader on damaged input (docs/results/hardening.md)
# make setup | format | golden | bench | clean
#
# Everything lands in .venv and build; nothing outside the clone but what pip caches.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
export PATH := $(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
PIP := $(PY) -m pip --disable-pip-version-check -q
DEPS := build/.deps
RUNTIME := build/.runtime
PACKAGE := build/.package
NATIVE := $(wildcard native/*.c native/*.h native/*.cpp native/*.inc native/*.cmake)
CFILES = $(wildcard native/*.[ch] native/*.cpp native/*.inc native/bakeoff/*.[ch] \
  native/fuzz/*.[ch] native/fuzz/*.cpp tools/*.c)
CMAKE_FLAGS := -G Ninja -DPTQTP_WERROR=ON

.PHONY: demo test test-native test-arm fuzz lint format golden bench setup clean

demo: setup
	$(PY) tools/demo.py

# the demo model first: several workers would all fetch it
test: setup test-native
	$(PY) tools/demo_model.py build/demo
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile

setup: $(PACKAGE)

$(DEPS): constraints.txt pyproject.toml
	@mkdir -p build
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt scikit-build-core cmake ninja
	$(PIP) install -c constraints.txt numpy gguf typer rich diskcache jinja2 typing-extensions \
	  torch transformers huggingface_hub accelerate safetensors sentencepiece protobuf \
	  pytest pytest-xdist hypothesis matplotlib openai playwright ruff mypy clang-format
	@touch $@

# The tool knows itself what changed: it is asked each time the inputs are newer, and compiles what it must.
$(RUNTIME): $(DEPS) tools/build_runtime.py $(wildcard patches/*) $(NATIVE)
	$(PY) tools/build_runtime.py --build-dir build
	$(PIP) install --no-deps --force-reinstall build/wheels/llama_cpp_python-*.whl
	@touch $@

$(PACKAGE): $(RUNTIME) pyproject.toml CMakeLists.txt $(NATIVE) $(shell find ptqtp_gguf -type f ! -name '*.pyc')
	$(PIP) install --no-deps --no-build-isolation --force-reinstall .
	@touch $@

test-native: $(DEPS)
	cmake -S . -B build/native $(CMAKE_FLAGS) > build/native.log
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure
	cmake -S . -B build/native-sanitize $(CMAKE_FLAGS) -DPTQTP_SANITIZE=ON > build/native-sanitize.log
	cmake --build build/native-sanitize
	ctest --test-dir build/native-sanitize --output-on-failure

# with i8mm, with the dot-product extension alone, and with neither
test-arm: $(DEPS)
	for cpu in max neoverse-n1 cortex-a72; do \
	  cmake -S . -B build/arm-$$cpu $(CMAKE_FLAGS) -DCMAKE_TOOLCHAIN_FILE=native/aarch64.cmake \
	    -DPTQTP_QEMU_CPU=$$cpu -DPTQTP_SHARED=OFF > build/arm-$$cpu.log && \
	  cmake --build build/arm-$$cpu && ctest --test-dir build/arm-$$cpu --output-on-failure || exit 1; \
	done

fuzz: setup
	$(PY) tools/fuzz.py --minutes 0.2 --compiler gcc rows dot quantize python loader

lint: $(DEPS)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CFILES)

format: $(DEPS)
	ruff check --fix .
	ruff format .
	clang-format -i $(CFILES)

golden: setup
	$(PY) tools/make_golden.py

bench: test-native
	build/native/ptqtp-bench

clean:
	rm -rf build .venv
