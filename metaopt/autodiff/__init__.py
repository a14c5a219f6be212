"""How derivatives are taken: by torch's own rules, and by ours where those are wrong, costly or
missing.
"""
