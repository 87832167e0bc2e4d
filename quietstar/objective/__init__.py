"""The non-myopic loss and REINFORCE (Quiet-STaR, sections 4.4.1 and 4.4.2)."""
