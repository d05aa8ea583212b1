"""The connection to an endpoint: its address, its key, and the proxy on the way, each of which may hold a secret."""

from __future__ import annotations

import ipaddress
import os
import re
import urllib.request

import httpx


def read_address(base_url: str) -> httpx.URL:
    """The address; raises ValueError where it holds more than an address, or is none."""
    try:
        url = httpx.URL(base_url)
        plain = url.scheme in ("http", "https") and bool(url.host) and (url.port or 0) < 1 << 16
        plain = plain and not re.search(r"[@?#\s]", base_url)
    except (httpx.InvalidURL, ValueError):
        plain = False
    if not plain:
        # Whatever stands before an @ or after a ? may be a secret.
        got = "one with a user, password, query or fragment" if re.search("[@?#]", base_url) else repr(base_url)
        raise ValueError(
            f"endpoint: base_url got {got}, expected only an address like 'https://host/v1'; put a key into the"
            " environment variable that api_key_variable names"
        )
    return url


def read_key(variable: str) -> str:
    """The key in an environment variable, empty where none is named; raises ValueError where it holds no key."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        fault = "holds no key: other characters than printable ASCII" if key else "is not set, or empty"
        raise ValueError(
            f"endpoint: the environment variable {variable}, named by api_key_variable, {fault}; export it, or set"
            " api_key_variable to '' for an endpoint without keys"
        )
    return key


def open_http(address: httpx.URL, key: str) -> httpx.AsyncClient:
    """An HTTP client that sends to one address, through the proxy that the environment names for it, if any.

    httpx itself refuses all proxy variables for one entry of NO_PROXY that it cannot read.

    Raises:
      ValueError: what an environment variable names cannot be used.
    """
    try:
        tls = httpx.create_ssl_context()
    except OSError as error:  # of which ssl's errors are
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if os.environ.get(name)]
        raise ValueError(
            f"endpoint: the environment variable {' or '.join(names)} names no usable file: {error}"
        ) from None
    proxies = urllib.request.getproxies_environment()
    scheme = next((scheme for scheme in (address.scheme, "all") if proxies.get(scheme)), "")
    if bypasses(proxies.get("no", ""), address.host, address.port):
        scheme = ""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        proxy = httpx.Proxy(re.sub(r"^(?!\w+://)", "http://", proxies[scheme])) if scheme else None
        if proxy and not proxy.url.host:
            raise ValueError
        # Time and number of requests are limited where they are sent.
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(verify=tls, headers=headers, proxy=proxy, trust_env=False, timeout=None, limits=limits)
    except ImportError:
        fault = "a SOCKS proxy, which needs `pip install socksio`"
    except (httpx.InvalidURL, ValueError):
        fault = "what is no proxy's address like 'http://host:3128'"
    # In lower case where it is there in both, as they are read.
    variable = max(name for name, value in os.environ.items() if value and name.lower() == f"{scheme}_proxy")
    # Its value may hold a password.
    raise ValueError(
        f"endpoint: the environment variable {variable} names {fault}; correct or unset it, or add {address.host!r} to"
        " NO_PROXY"
    )


def bypasses(no_proxy: str, host: str, port: int | None) -> bool:
    """Whether an entry of NO_PROXY means a host: `*`, a domain, or an address or a range with or without brackets.

    An entry with a port means that port alone; an entry that is none of these means nothing.
    """
    for entry in no_proxy.lower().split(","):
        name = re.sub(r"^\w+://", "", entry.strip())
        if parts := re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", name):
            if int(parts[2]) != port:
                continue
            name = parts[1]
        name = re.sub(r"[\[\]]", "", name)
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False):
                return True
        except ValueError:
            domain = name.lstrip("*").lstrip(".")
            if name == "*" or (domain and f".{host.lower()}".endswith(f".{domain}")):
                return True
    return False
