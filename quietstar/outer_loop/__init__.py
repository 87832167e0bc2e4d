"""Loops that improve a model from its own rationales: STaR and V-STaR."""
