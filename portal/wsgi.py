"""The WSGI application that gunicorn serves."""

import os

from django.core.wsgi import get_wsgi_application

from batches import storage
from batches.multipart import MeasuredBody

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")

application = MeasuredBody(get_wsgi_application())
storage.prepare()
