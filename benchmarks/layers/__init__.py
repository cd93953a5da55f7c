"""The layer benchmark: what a linear layer with mixout costs beside the ones it replaces.

python -m benchmarks.layers                    measure here; JSON, table and plot into results/bench
python -m benchmarks.layers.report JSON        table and plot again from a saved JSON
"""
