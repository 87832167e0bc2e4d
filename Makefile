# Short names for what CONTRIBUTING.md explains; each needs an environment with the packages that it names.
.PHONY: test check docs bench

test: # pip install -c constraints.txt -e '.[test]'
	pytest -n auto

check: # the same
	ruff check
	ruff format --check
	mypy
	lint-imports

docs: # pip install -e '.[docs]'; the pages are then in site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench: # the kernels and a training step on this machine; writes to benchmarks/results/
	python benchmarks/thought_attention.py
	python benchmarks/mixed_cross_entropy.py
	python benchmarks/token_sampling.py
	python benchmarks/engine_throughput.py
