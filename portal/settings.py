"""Every setting of the project, read from the environment (see .env.example).

A GPU host runs without the `portal` extra: apps that need it are listed only where installed.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured
from redis.backoff import NoBackoff
from redis.retry import Retry

from portal import embedded, logs
from portal.environment import own_secret, read, read_bool, read_int, read_list, read_seconds
from portal.storage_url import store_of

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(read("DATA_DIR", str(BASE_DIR / "var"))).resolve()

ENVIRONMENT = read("ENVIRONMENT", "development")
if ENVIRONMENT not in ("development", "production"):
    raise ImproperlyConfigured(
        f"ENVIRONMENT must be development or production, not {ENVIRONMENT!r}"
    )
PRODUCTION = ENVIRONMENT == "production"
# What `./run manage workers` shows as version; without it, the commit.
BUILD_ID = read("BUILD_ID")
DEBUG = read_bool("DEBUG")
SECRET_KEY = read("SECRET_KEY")
if PRODUCTION and (DEBUG or len(SECRET_KEY) < 32):
    raise ImproperlyConfigured(
        "ENVIRONMENT=production needs DEBUG off and a SECRET_KEY of at least 32 characters "
        "(python -c 'import secrets; print(secrets.token_urlsafe(50))')"
    )
SECRET_KEY = SECRET_KEY or own_secret(DATA_DIR / "secret_key")

BASE_URL = read("BASE_URL", "http://127.0.0.1:8000").rstrip("/")
ALLOWED_HOSTS = read_list("ALLOWED_HOSTS", "*" if not PRODUCTION else "") or [
    urlsplit(BASE_URL).hostname or "localhost"
]
# How many proxies of our own stand before the web server: whose X-Forwarded-For is believed.
TRUSTED_PROXY_COUNT = read_int("TRUSTED_PROXY_COUNT", 0)
CSRF_TRUSTED_ORIGINS = [BASE_URL] if BASE_URL.startswith("https:") else []

# --- Services -------------------------------------------------------------------------------
_services = embedded.urls(DATA_DIR)
DATABASE_URL = read("DATABASE_URL") or (_services.database_url if _services else "")
REDIS_URL = read("REDIS_URL") or (_services.redis_url if _services else "")
_database = environ.Env.db_url_config(DATABASE_URL or "postgresql://portal@127.0.0.1:5432/portal")
DATABASES = {
    "default": {
        **_database,
        "CONN_MAX_AGE": None,
        # A connection that died with its server is noticed before it costs a caller a 500.
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {
            "connect_timeout": 5,
            "application_name": "vllm-batch-portal",
            # Where packets vanish nobody says so: the kernel gives up on a server that has been
            # silent for about 25 s, not after its own default of a quarter of an hour or two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 25_000,  # milliseconds, for what was sent
            **_database.get("OPTIONS", {}),  # what the URL says: sslmode=verify-full, say
        },
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STORE = store_of(read("STORAGE_URL", f"file:{DATA_DIR / 'files'}"), DATA_DIR)
FILE_UPLOAD_TEMP_DIR = STORE.spool
FILE_UPLOAD_TEMP_DIR.mkdir(parents=True, exist_ok=True)
FILE_UPLOAD_HANDLERS = ["batches.storage.UploadHandler"]
STORAGES = {
    "default": {"BACKEND": STORE.backend, "OPTIONS": STORE.options},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"}
    if PRODUCTION
    else {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}

# --- Celery ---------------------------------------------------------------------------------
CELERY_BROKER_URL = REDIS_URL or "redis://127.0.0.1:6379/0"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    # Without these two, Kombu looks for lost messages only every ~100 s.
    "unacked_restore_interval": 2,
    "unacked_restore_throttle": 1,
    # A server that is mute is given up soon: who sends a wake-up waits for it, and sweeps repeat it.
    "socket_connect_timeout": 2,
    "socket_timeout": 3,
    "connect_retries_timeout": 1,
    # A subscription that hears nothing is replaced after three of these.
    "health_check_interval": 10,
}
CELERY_TASK_PUBLISH_RETRY = False
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False
CELERY_DB_REUSE_MAX = 10_000
CELERY_TASK_DEFAULT_QUEUE = "cpu"
# They wait for others' servers: in a worker of their own they hold up nothing else.
CELERY_TASK_ROUTES = {
    "batches.tasks.deliver": {"queue": "webhooks"},
    "batches.tasks.handle_results": {"queue": "handlers"},
}
CELERY_TASK_CREATE_MISSING_QUEUES = True
SWEEP_SECONDS = read_int("SWEEP_SECONDS", 3)
CELERY_BEAT_SCHEDULE = {
    "sweep": {
        "task": "batches.tasks.sweep",
        "schedule": SWEEP_SECONDS,
        # Sweeps that nobody ran in time would only queue up behind each other.
        "options": {"expires": SWEEP_SECONDS * 2},
    },
}

# --- The queue ------------------------------------------------------------------------------
LEASE_SECONDS = read_int("LEASE_SECONDS", 30)
CHUNK_REQUESTS = read_int("CHUNK_REQUESTS", 1000)
CHUNK_SECONDS = read_int("CHUNK_SECONDS", 45)
# Of the host's memory, for the models that sleep beside one worker's; 0: none does; None: as much
# as leaves a fifth of the host's memory free.
SLEEPING_MODELS_GB = read_int("SLEEPING_MODELS_GB", 0) if read("SLEEPING_MODELS_GB") else None
# How long a worker may take over one load, the download of the weights included.
LOAD_SECONDS = read_int("LOAD_SECONDS", 3600)
# Whether a worker downloads, and reads into free memory, the weights of the model that it will
# most likely load next.
PREFETCH = read_bool("PREFETCH", True)

# --- GPUs -----------------------------------------------------------------------------------
# A worker feeds its GPU nothing above these; 0: no limit, for the temperature the GPU's own.
GPU_GUARD = read_bool("GPU_GUARD", True)
GPU_MAX_TEMPERATURE = read_int("GPU_MAX_TEMPERATURE", 0)  # °C
GPU_MAX_POWER = read_int("GPU_MAX_POWER", 0)  # watts
GPU_MAX_MEMORY = read_int("GPU_MAX_MEMORY", 0)  # per cent that is used
if min(GPU_MAX_TEMPERATURE, GPU_MAX_POWER, GPU_MAX_MEMORY) < 0:
    raise ImproperlyConfigured("GPU_MAX_TEMPERATURE, _POWER and _MEMORY cannot be negative")

# --- Real-time requests ------------------------------------------------------------------------
# Threads of each web process for them, beside those for all else; and for one organization's.
LANE_THREADS = read_int("LANE_THREADS", 8)
LANE_THREADS_OF_ONE = read_int("LANE_THREADS_OF_ONE", max(1, LANE_THREADS * 3 // 4))
# How long one may take.
LANE_SECONDS = read_int("LANE_SECONDS", 600)
# How many requests that an engine could run at once batches leave to them, while there are any.
LANE_SLOTS = read_int("LANE_SLOTS", 8)

# --- Money ----------------------------------------------------------------------------------
# What models' prices and budgets are in (ISO 4217): a name beside the numbers, no conversion.
CURRENCY = read("CURRENCY", "usd").lower()
if not re.fullmatch("[a-z]{3}", CURRENCY):
    raise ImproperlyConfigured(f"CURRENCY must be three letters, as usd, not {CURRENCY!r}")

# --- Limits of the wire ---------------------------------------------------------------------
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_BATCH_FILE_BYTES = 200 * 1024 * 1024
MAX_BATCH_REQUESTS = 50_000
MAX_LINE_BYTES = read_int("MAX_LINE_BYTES", 8 * 1024 * 1024)
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024

# --- Django ---------------------------------------------------------------------------------
_HAS_PORTAL = find_spec("allauth") is not None
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django.contrib.auth",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.postgres",
    "django.contrib.staticfiles",
    "accounts",
    "models_registry",
    "batches",
    "worker",
]
if _HAS_PORTAL:
    INSTALLED_APPS += [
        "portal",
        "allauth",
        "allauth.account",
        "allauth.mfa",
        "allauth.socialaccount",
        "allauth.socialaccount.providers.openid_connect",
        "allauth.usersessions",
        "django.contrib.humanize",
        "django_htmx",
        "template_partials",
        "ninja",
    ]
MIDDLEWARE = [
    "portal.middleware.request_id",
    "portal.metrics.measure",
    "accounts.middleware.origin",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "portal.middleware.content_security_policy",
    "portal.middleware.rate_limits",
    "portal.middleware.api_errors",
    "portal.middleware.small_bodies",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "accounts.middleware.current_organization",
    "portal.middleware.method_not_allowed",
]
ROOT_URLCONF = "portal.urls"
WSGI_APPLICATION = "portal.wsgi.application"
APPEND_SLASH = False
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
            "builtins": [
                "portal.templatetags.icons",
                "portal.templatetags.moments",
                "portal.templatetags.owned_forms",
            ],
        },
    }
]
STATIC_URL = "static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS = [BASE_DIR / "static"]
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = not PRODUCTION

DJANGO_REDIS_LOG_IGNORED_EXCEPTIONS = True

LANGUAGE_CODE = "en"
USE_I18N = False  # pages are English; looking for translations takes a tenth of a page's time
TIME_ZONE = "UTC"
USE_TZ = True

# --- Sign-in --------------------------------------------------------------------------------
AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
PASSWORD_HASHERS = ["django.contrib.auth.hashers.Argon2PasswordHasher"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "account_login"
LOGIN_REDIRECT_URL = "/"
REGISTRATION = read("REGISTRATION", "invite")
if REGISTRATION not in ("open", "invite", "closed"):
    raise ImproperlyConfigured(f"REGISTRATION must be open, invite or closed, not {REGISTRATION!r}")
OPERATOR_MFA_REQUIRED = read_bool("OPERATOR_MFA_REQUIRED", PRODUCTION)

_HTTPS = BASE_URL.startswith("https:")
ALLAUTH_TRUSTED_PROXY_COUNT = TRUSTED_PROXY_COUNT
ACCOUNT_ADAPTER = "accounts.adapter.AccountAdapter"
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_SIGNUP_FORM_CLASS = "accounts.forms.sign_up.InvitedEmail"
ACCOUNT_CHANGE_EMAIL = True
ACCOUNT_DEFAULT_HTTP_PROTOCOL = "https" if _HTTPS else "http"
ACCOUNT_EMAIL_NOTIFICATIONS = True
ACCOUNT_EMAIL_SUBJECT_PREFIX = ""
ACCOUNT_EMAIL_VERIFICATION = "mandatory"
# A code, not a link: it works on another device, and with two-factor authentication.
ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED = True
ACCOUNT_EMAIL_VERIFICATION_SUPPORTS_RESEND = True
ACCOUNT_PREVENT_ENUMERATION = "strict"
ACCOUNT_REAUTHENTICATION_REQUIRED = True
# Failures are counted by what was typed, known or not, and by address; others are allauth's own.
ACCOUNT_RATE_LIMITS = {
    "login": "30/m/ip",
    "login_failed": "10/m/ip,60/h/ip,5/5m/key",
    "signup": "10/m/ip,60/h/ip",
    "reset_password": "10/m/ip,5/h/key",
    "reset_password_from_key": "10/m/ip",
}
SOCIALACCOUNT_ADAPTER = "accounts.adapter.SocialAccountAdapter"
USERSESSIONS_ADAPTER = "accounts.adapter.UserSessionsAdapter"
MFA_ADAPTER = "accounts.adapter.MFAAdapter"
MFA_FORMS = {"add_webauthn": "accounts.forms.passkeys.PasskeyForm"}
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
MFA_PASSKEY_LOGIN_ENABLED = True
MFA_RECOVERY_CODES_SHOW_ONCE = True
MFA_TOTP_ISSUER = "vLLM Batch Portal"
MFA_TOTP_TOLERANCE = 1

# An OpenID Connect provider for the whole site; an organization's own are rows (IdentityProvider).
OIDC_ISSUER = read("OIDC_ISSUER")
if OIDC_ISSUER and not read("OIDC_CLIENT_ID"):
    raise ImproperlyConfigured("OIDC_ISSUER needs OIDC_CLIENT_ID")
SOCIALACCOUNT_PROVIDERS = {
    "openid_connect": {
        "OAUTH_PKCE_ENABLED": True,
        "APPS": [
            {
                "provider_id": "site",
                "name": read("OIDC_NAME", "single sign-on"),
                "client_id": read("OIDC_CLIENT_ID"),
                "secret": read("OIDC_CLIENT_SECRET"),
                "settings": {"server_url": OIDC_ISSUER.rstrip("/")},
            }
        ]
        if OIDC_ISSUER
        else [],
    }
}
INVITATION_DAYS = read_int("INVITATION_DAYS", 7)
INVITATIONS_PER_DAY = read_int("INVITATIONS_PER_DAY", 100)
# Hosts with private addresses whose tokens organizations may trust: a Kubernetes of one's own.
TRUSTED_ISSUER_PRIVATE_HOSTS = read_list("TRUSTED_ISSUER_PRIVATE_HOSTS")

# --- Webhooks -------------------------------------------------------------------------------
WEBHOOK_PORTS = frozenset(map(int, read_list("WEBHOOK_PORTS", "80,443")))
# Receivers in networks of one's own, as host or host:port; all other private addresses are refused.
WEBHOOK_PRIVATE_HOSTS = read_list("WEBHOOK_PRIVATE_HOSTS")
# Before each attempt of a delivery, and after so many failures of an endpoint in a row.
WEBHOOK_RETRY_SECONDS = read_seconds(
    "WEBHOOK_RETRY_SECONDS", "0,5,300,1800,7200,18000,36000,50400,72000,72000"
)
WEBHOOK_PAUSE_SECONDS = read_seconds("WEBHOOK_PAUSE_SECONDS", "1,5,30,60")
# Beyond its timeout, until an endpoint is taken from a process that may have died with it.
WEBHOOK_GRACE_SECONDS = read_int("WEBHOOK_GRACE_SECONDS", 30)

# --- Result handlers ------------------------------------------------------------------------
HANDLER_PORTS = frozenset(map(int, read_list("HANDLER_PORTS", "80,443,3306,5432")))
# Databases and stores in networks of one's own, as host or host:port, on any port.
HANDLER_PRIVATE_HOSTS = read_list("HANDLER_PRIVATE_HOSTS")
# Where results may be written to SQLite files, in a folder for each organization; empty: nowhere.
HANDLER_SQLITE_DIR = read("HANDLER_SQLITE_DIR")

# --- Mail -----------------------------------------------------------------------------------
globals().update(environ.Env.email_url_config(read("EMAIL_URL", "consolemail://")))
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = SERVER_EMAIL = read(
    "DEFAULT_FROM_EMAIL", f"vLLM Batch Portal <portal@{urlsplit(BASE_URL).hostname}>"
)

# --- The browser's side of security; the content security policy is in portal/middleware.py ----
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = _HTTPS
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_HTTPONLY = True
if _HTTPS:  # a browser takes a cookie of such a name from this host alone, and over TLS
    SESSION_COOKIE_NAME, CSRF_COOKIE_NAME = "__Host-session", "__Host-csrf"
# Only a proxy of our own can know that a request came over TLS, and only then can we redirect.
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if TRUSTED_PROXY_COUNT else None
SECURE_SSL_REDIRECT = _HTTPS and TRUSTED_PROXY_COUNT > 0
SECURE_REDIRECT_EXEMPT = ["^(healthz|readyz|metrics)$"]
SECURE_HSTS_SECONDS = 31_536_000 if _HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = read_bool("HSTS_INCLUDE_SUBDOMAINS", True)
# Preloading is for ever, and for the whole domain: its owner's decision, not the portal's.
SILENCED_SYSTEM_CHECKS = ["security.W021"]
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

CACHES = {
    "default": {
        "BACKEND": "portal.cache.Cache",
        "LOCATION": CELERY_BROKER_URL,
        "KEY_PREFIX": "cache",
        "OPTIONS": {
            # With Redis away people can still sign in; what counts attempts lets them through.
            "IGNORE_EXCEPTIONS": True,
            "SOCKET_CONNECT_TIMEOUT": 1,
            "SOCKET_TIMEOUT": 1,
        },
    },
    # What counts calls has to know that Redis is away, and may not wait for it. The fragment only
    # makes it another address: django-redis keeps one pool, with the first one's options, for each.
    "limits": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": f"{CELERY_BROKER_URL}#limits",
        "KEY_PREFIX": "limits",
        "OPTIONS": {
            "IGNORE_EXCEPTIONS": False,
            "SOCKET_CONNECT_TIMEOUT": 0.25,
            "SOCKET_TIMEOUT": 0.5,
            # Once more at once, for connections that a restarted server has forgotten.
            "CONNECTION_POOL_KWARGS": {"retry": Retry(NoBackoff(), 1)},
        },
    },
}

# --- Rate limits: each for a minute; a platform operator can set others (./run manage set_limits) ---
RATELIMIT_USE_CACHE = "limits"
RATE_LIMIT_REQUESTS = read_int("RATE_LIMIT_REQUESTS", 600)
RATE_LIMIT_BATCHES = read_int("RATE_LIMIT_BATCHES", 10)
RATE_LIMIT_FILES = read_int("RATE_LIMIT_FILES", 20)
RATE_LIMIT_ANONYMOUS = read_int("RATE_LIMIT_ANONYMOUS", 300)
RATE_LIMIT_WHEN_REDIS_IS_DOWN = read("RATE_LIMIT_WHEN_REDIS_IS_DOWN", "open-for-reads")
if RATE_LIMIT_WHEN_REDIS_IS_DOWN not in ("open", "open-for-reads", "closed"):
    raise ImproperlyConfigured(
        "RATE_LIMIT_WHEN_REDIS_IS_DOWN must be open, open-for-reads or closed,"
        f" not {RATE_LIMIT_WHEN_REDIS_IS_DOWN!r}"
    )
# For a Prometheus on another host, which sends it as a bearer token; without one, none gets in.
METRICS_TOKEN = read("METRICS_TOKEN")

LOGGING_CONFIG = None
logs.configure(read("LOG_LEVEL", "INFO"))
