"""Train one small encoder twice, with torch's attention and with MRA attention, and compare; see ``__main__``."""
