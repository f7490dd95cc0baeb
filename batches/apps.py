from django.apps import AppConfig


class BatchesConfig(AppConfig):
    name = "batches"

    def ready(self) -> None:
        from accounts.consumption import measure_storage_with
        from batches.queries.files import bytes_kept

        measure_storage_with(bytes_kept)
        from batches import signals  # noqa: F401 connects itself
