# Every target sets up .venv by itself. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Threads that wait must not spin: beside another job that makes a step many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train test lab notebooks bench lint colab
# The README shows the pictures of the last run on MNIST itself.
train: $(READY)
	@out=runs/$$(date +%Y-%m-%d_%H-%M-%S)_$$$$; $(BIN)/python mnist_sae_train.py --out $$out && \
		if grep -q '"is_mnist": true' $$out/metrics.json; then cp $$out/*.png visualizations/; fi

test: lint
	$(BIN)/pytest tests --cov --cov-fail-under=95
	WANDB_MODE=disabled $(BIN)/pytest --nbmake notebooks

lab: $(READY)
	$(BIN)/jupyter lab notebooks

notebooks: $(READY)
	$(BIN)/python tools/notebooks.py run

bench: $(READY)
	$(BIN)/python benchmarks/training.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

colab: $(READY)
	$(BIN)/python tools/notebooks.py colab "$(REPO)"

# Renewed when the dependencies change, and after an installation that broke off.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3.10 …"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@
