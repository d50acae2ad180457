"""As ``with_deep_ep``, with a stand-in for Transformer Engine as well."""

from helpers import fake_deep_ep

fake_deep_ep.install_with_engine()
