"""Training text: reads documents, cuts them into texts of tokens, and puts the texts into a seeded order.

Nothing here imports models or trainers. `loading.py` is read first: it makes batches from the data options.
"""
