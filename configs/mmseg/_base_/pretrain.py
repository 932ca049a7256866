# What every pre-training run shares: loop, hooks, log, checkpoints.
default_scope = "mmengine"
custom_imports = dict(imports=["jepa_plugins.mm"], allow_failed_imports=False)
randomness = dict(seed=0)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
model_wrapper_cfg = dict(type="PretrainDistributed")
custom_hooks = [dict(type="TargetHook"), dict(type="CollapseHook")]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="PretrainCheckpointHook", interval=5000, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False, window_size=50)
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_level = "INFO"
load_from = None
resume = False
