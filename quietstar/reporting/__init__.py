"""What a run shows of itself: `report.html`, sampled thoughts, and the machine that it ran on."""
