"""Pages about runs, loops, comparisons and evaluations, and the thought viewer; made from files, without a model.

Read `page.py` first (pieces of HTML), then `scales.py` and `charts.py`, then a page such as `train_report.py`.
"""
