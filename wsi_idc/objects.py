"""Places in object stores, by URL: s3://bucket/prefix, gs://bucket/prefix, az://container/prefix.

Credentials, region and endpoint come from the environment, by the names that each provider's own tools use
(`docs/store.md` lists them). What goes wrong becomes an `OSError` that says which place and what the matter is, so that
those who read and write need not know what they read and write on.
"""

import errno
import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from wsi_idc.errors import ObjectsError, UsageError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
_RETRY = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}
"""Of a request that met a busy server or a broken connection; the work of a night should outlive a minute of either."""
_CLIENT = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")


def is_url(text: object) -> bool:
    """Whether a user's word for a place is a URL, of whichever scheme."""
    return "://" in str(text)


def objects_at(url: str) -> "ObjectStore":
    """The objects below a URL; nothing is asked of the server yet.

    Raises:
        UsageError: it is no URL of a scheme that is supported, or the environment lacks what its provider needs.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(url, f"{scheme}:// is not supported", f"give a folder, or a URL that begins with {known}")
    if not rest.partition("/")[0]:
        raise UsageError(url, "names no bucket", f"write {scheme}://BUCKET/PREFIX")
    config: Any = {}
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL_S3")):
        config["endpoint"] = endpoint
    # Whoever names an endpoint of http:// means it: the library would refuse, and say only "builder error".
    plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
    client: Any = {**_CLIENT, "allow_http": plain}
    retry: Any = _RETRY
    try:
        return from_url(url.rstrip("/"), config=config, client_options=client, retry_config=retry)
    except (BaseError, ValueError) as error:
        advice = "set what its provider needs in the environment: see docs/store.md"
        raise UsageError(url, f"cannot be opened ({_first_line(error)})", advice) from error


def objects_error(url: str, error: BaseException) -> ObjectsError:
    """What an error of obstore says, as an error of the system: which place, what, and what to do."""
    from obstore import exceptions

    text = str(error)
    code = next(iter(re.findall(r"<Code>(\w+)</Code>", text)), "")
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"):
        return ObjectsError(errno.EACCES, f"the credentials have expired ({code}): renew them", url)
    if code == "NoSuchBucket" or "ContainerNotFound" in text:
        return ObjectsError(errno.ENODEV, "there is no such bucket: create it, or correct its name", url)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError) or code in _DENIED:
        what = f" ({code})" if code else ""
        return ObjectsError(errno.EACCES, f"permission denied{what}: check the credentials and their rights", url)
    if any(place in text for place in _GIVE_CREDENTIALS):
        return ObjectsError(errno.EACCES, "no credentials were found: set them in the environment", url)
    if "error sending request" in text or "timed out" in text:
        return ObjectsError(errno.ETIMEDOUT, "the server does not answer: check the endpoint and the network", url)
    return ObjectsError(errno.EIO, f"the object store failed ({code or _first_line(error)}): try again", url)


_GIVE_CREDENTIALS = ("169.254.169.254", "metadata.google.internal")
"""Who is asked for credentials where the environment has none: a machine in a cloud has them, any other does not."""
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AllAccessDisabled")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
