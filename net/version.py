"""The version of the distribution, for those who tell it to others."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("raceme")
except PackageNotFoundError:  # run from a checkout that is not installed
    VERSION = "0+unknown"
