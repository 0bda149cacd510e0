"""Two pretrained models with MRA attention: what a budget costs in accuracy and saves in time."""
