"""A model run one block at a time: what every pass is made of."""
