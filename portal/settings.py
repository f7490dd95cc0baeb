"""Every setting of the project, read from the environment (see .env.example).

A GPU host runs without the `portal` extra: apps that need it are listed only where installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

from portal import embedded, logs
from portal.environment import own_secret, read, read_bool, read_int, read_list

BASE_DIR = Path(__file__).resolve().parent.parent
DATA_DIR = Path(read("DATA_DIR", str(BASE_DIR / "var"))).resolve()

ENVIRONMENT = read("ENVIRONMENT", "development")
if ENVIRONMENT not in ("development", "production"):
    raise ImproperlyConfigured(
        f"ENVIRONMENT must be development or production, not {ENVIRONMENT!r}"
    )
PRODUCTION = ENVIRONMENT == "production"
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
CSRF_TRUSTED_ORIGINS = [BASE_URL] if BASE_URL.startswith("https:") else []

# --- Services -------------------------------------------------------------------------------
_services = embedded.urls(DATA_DIR)
DATABASE_URL = read("DATABASE_URL") or (_services.database_url if _services else "")
REDIS_URL = read("REDIS_URL") or (_services.redis_url if _services else "")
DATABASES = {
    "default": {
        **environ.Env.db_url_config(DATABASE_URL or "postgresql://portal@127.0.0.1:5432/portal"),
        "CONN_MAX_AGE": None,
        # A connection that died with its server is noticed before it costs a caller a 500.
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {"connect_timeout": 5, "application_name": "vllm-batch-portal"},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STORAGE_URL = read("STORAGE_URL", f"file:{DATA_DIR / 'files'}")
if not STORAGE_URL.startswith("file:"):
    raise ImproperlyConfigured("STORAGE_URL must be file:FOLDER")
STORAGE_ROOT = Path(STORAGE_URL.removeprefix("file:").removeprefix("//")).resolve()
# Uploads are spooled on the storage's own filesystem, so that keeping one is a rename.
FILE_UPLOAD_TEMP_DIR = STORAGE_ROOT / "incoming"
FILE_UPLOAD_TEMP_DIR.mkdir(parents=True, exist_ok=True)
FILE_UPLOAD_HANDLERS = ["django.core.files.uploadhandler.TemporaryFileUploadHandler"]
STORAGES = {
    "default": {
        "BACKEND": "django.core.files.storage.FileSystemStorage",
        "OPTIONS": {"location": STORAGE_ROOT},
    },
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
    "socket_connect_timeout": 2,
    "socket_timeout": 10,
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
        "django_htmx",
        "template_partials",
        "ninja",
    ]
MIDDLEWARE = [
    "portal.middleware.request_id",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "portal.middleware.content_security_policy",
    "portal.middleware.api_errors",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "accounts.middleware.current_organization",
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
ACCOUNT_ADAPTER = "accounts.adapter.AccountAdapter"
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_EMAIL_VERIFICATION = "none"
EMAIL_BACKEND = "django.core.mail.backends.console.EmailBackend"

SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = BASE_URL.startswith("https:")
SESSION_COOKIE_SAMESITE = "Lax"
SECURE_SSL_REDIRECT = False
SECURE_HSTS_SECONDS = 31_536_000 if BASE_URL.startswith("https:") else 0
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

CACHES = {
    "default": {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": CELERY_BROKER_URL,
        "KEY_PREFIX": "cache",
        "OPTIONS": {
            # With Redis away people can still sign in; what counts attempts lets them through.
            "IGNORE_EXCEPTIONS": True,
            "SOCKET_CONNECT_TIMEOUT": 1,
            "SOCKET_TIMEOUT": 1,
        },
    }
}

LOGGING_CONFIG = None
logs.configure(read("LOG_LEVEL", "INFO"))
