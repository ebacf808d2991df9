# make demo   set up, convert SmolLM2-135M, generate text, compare with Q4_0
# make test   set up, native tests, test suite          make lint   ruff, mypy, clang-format
# make dev    the package editable in .venv, without the runtime: an edit of Python is seen at once
# make t ROOM=codec   the quick tests of one room, in seconds; without ROOM, those of all rooms
# make test-arm   kernels under qemu-user (Debian: gcc-aarch64-linux-gnu g++-aarch64-linux-gnu qemu-user)
# make fuzz   a minute of native code, readers and loader on damaged input (docs/results/hardening.md)
# make test-all   what else it must run on: compilers, sanitizers, instruction sets, emulated CPUs, Pythons (tools/matrix.py)
# make wheels   wheels for any x86-64 and 64-bit ARM Linux from glibc 2.31 on, with all that they run (RELEASE.md)
# make index   a package index of them, static pages for pip and uv
# make portable   the runtime alone as a wheel, llama-cpp-python for any CPU of this machine's kind
# make lock | audit   exact versions with hashes, from requirements/setup.in; their known vulnerabilities
# make setup | format | golden | bench | clean
#
# Everything lands in .venv and build; nothing outside the clone but what pip caches. What pip installs is checked
# against the hashes in requirements/*.lock, and the sdist of the runtime against the one in patches/UPSTREAM.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
PY := $(VENV)/bin/python
export PATH := $(VENV)/bin:$(PATH)
export HF_HUB_OFFLINE := 1
PIP := $(PY) -m pip --disable-pip-version-check -q
DEPS := build/.deps
RUNTIME := build/.runtime
PACKAGE := build/.package
DEV := build/.dev
NATIVE := $(shell find native -type f)
CFILES = $(filter %.c %.h %.cpp %.inc,$(NATIVE)) $(shell find tools -name '*.c')
CMAKE_FLAGS := -G Ninja -DPTQTP_WERROR=ON

.PHONY: demo dev t test test-native test-arm test-all portable wheels index lock audit fuzz lint format
.PHONY: golden bench setup clean

demo: setup
	$(PY) tools/demo.py

# the demo model first: several workers would all fetch it
test: setup test-native
	$(PY) tools/fixtures/demo_model.py build/demo
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadfile

setup: $(PACKAGE)

# Wheels only, so nothing downloaded runs while it is installed. torch: a CPU build where pip finds one that cpu.lock
# knows (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL; `make lock` adds it), else the index' own, on Linux with NVIDIA's libraries.
LOCKED := $(PIP) install --no-deps --only-binary :all: --require-hashes
$(DEPS): $(wildcard requirements/*.lock) pyproject.toml
	@mkdir -p build
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(LOCKED) -r requirements/setup.lock
	$(LOCKED) -r requirements/cpu.lock 2> build/torch.log || \
	  { $(LOCKED) -r requirements/torch.lock && $(LOCKED) -r requirements/cuda.lock; }
	@touch $@

# The tool knows itself what changed: it is asked each time the inputs are newer, and compiles what it must.
$(RUNTIME): $(DEPS) tools/build/build_runtime.py $(wildcard patches/*) $(NATIVE)
	$(PY) tools/build/build_runtime.py --build-dir build
	$(PIP) install --no-deps --force-reinstall build/wheels/llama_cpp_python-*.whl
	@touch $@

$(PACKAGE): $(RUNTIME) pyproject.toml CMakeLists.txt $(NATIVE) $(shell find ptqtp_gguf -type f ! -name '*.pyc')
	$(PIP) install --no-deps --no-build-isolation --force-reinstall .
	@rm -f $(DEV)
	@touch $@

# .venv has one ptqtp-gguf: the wheel, which `setup` installs (so `test`, `demo`, `fuzz`), or the clone, which `dev`
# installs (so `t`). Each takes the other's place and removes its stamp: what a target tests does not depend on what was
# made before. "inplace" is a .pth file with the path of the clone; the library is copied to where the package looks.
# It is ignored by git, and therefore left out of wheels and sdists, which get the one that CMake builds for them.
dev: $(DEV)

$(DEV): $(DEPS) CMakeLists.txt $(NATIVE)
	cmake -S . -B build/dev $(CMAKE_FLAGS) -DPTQTP_TESTS=OFF > build/dev.log
	cmake --build build/dev
	cmake --install build/dev --prefix . >> build/dev.log
	$(PIP) install --no-deps --no-build-isolation --force-reinstall -C editable.mode=inplace -C wheel.cmake=false -e .
	@rm -f $(PACKAGE)
	@touch $@

# status 5: all tests of the room are left out, as pytest says
t: $(DEV)
	$(VENV)/bin/pytest tests/$(ROOM) -n0 -m "not runtime and not hf and not slow" -q || test $$? = 5

test-native: $(DEPS)
	cmake -S . -B build/native $(CMAKE_FLAGS) > build/native.log
	cmake --build build/native
	ctest --test-dir build/native --output-on-failure
	cmake -S . -B build/native-sanitize $(CMAKE_FLAGS) -DPTQTP_SANITIZE=ON > build/native-sanitize.log
	cmake --build build/native-sanitize
	ctest --test-dir build/native-sanitize --output-on-failure

# with i8mm, with the dot-product extension alone, and with neither
test-arm: $(DEPS)
	$(PY) tools/matrix.py --only aarch64-cortex-a72 aarch64-neoverse-n1 aarch64-max --no-skips

test-all: setup
	$(PY) tools/matrix.py

portable: $(DEPS)
	$(PY) tools/build/build_runtime.py --portable --build-dir build --wheel-dir build/portable

# Debian: clang-16 lld-16
wheels: $(DEPS)
	$(LOCKED) -r requirements/wheels.lock
	$(PY) tools/build/wheels.py x86_64 aarch64

index: $(DEPS)
	$(PY) tools/build/index.py

lock:
	test -x build/lock-venv/bin/python || $(PYTHON) -m venv build/lock-venv
	build/lock-venv/bin/python -m pip --disable-pip-version-check -q install uv
	build/lock-venv/bin/python tools/build/lock.py

# needs a service of vulnerabilities (PyPI's JSON interface); a package that it does not know is an error
audit:
	test -x build/lock-venv/bin/python || $(PYTHON) -m venv build/lock-venv
	build/lock-venv/bin/python -m pip --disable-pip-version-check -q install pip-audit
	for lock in setup cpu torch cuda; do \
	  build/lock-venv/bin/pip-audit --strict --disable-pip --no-deps -r requirements/$$lock.lock || exit 1; \
	done

fuzz: setup
	$(PY) tools/fuzz/fuzz.py --minutes 0.2 --compiler gcc rows dot quantize python loader

lint: $(DEPS)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run --Werror $(CFILES)

format: $(DEPS)
	ruff check --fix .
	ruff format .
	clang-format -i $(CFILES)

golden: $(DEV)
	$(PY) tools/fixtures/make_golden.py

bench: test-native
	build/native/ptqtp-bench

clean:
	rm -rf build .venv
