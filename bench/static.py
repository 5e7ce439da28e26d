def add(results, quick): pass
