"""MRA attention inside other libraries; each module imports its library, and nothing here is imported by default."""
