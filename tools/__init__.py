"""Headless runs, pages and several processes: what make calls and no notebook imports."""
