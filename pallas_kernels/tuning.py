from pallas_kernels import dispatch
import importlib
def sizes(op, implementation, platform, key):
    return importlib.import_module(f"pallas_kernels.{op}.{implementation}").heuristic(platform, key)
