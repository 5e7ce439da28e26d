def add(results):
    pass
