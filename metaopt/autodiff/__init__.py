"""How derivatives are taken: by torch's rules, and by ours where those are wrong or costly."""
