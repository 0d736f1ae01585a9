"""Studies: what a claim costs and what it gives, run by run, with results that are kept."""
