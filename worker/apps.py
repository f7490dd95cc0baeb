from django.apps import AppConfig


class WorkerConfig(AppConfig):
    name = "worker"

    def ready(self) -> None:
        from batches.queries.queue import see_workers_with
        from models_registry.queries import see_gpus_with
        from worker.queries import alive, gpu_kinds

        see_workers_with(alive)
        see_gpus_with(gpu_kinds)
