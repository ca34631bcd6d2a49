{{/* SPDX-License-Identifier: Apache-2.0
The worker's pod. All take (dict "root" $ "role" ROLE "worker" VALUES), VALUES being those of tandem.workerValues. */}}

{{- define "tandem.workerArgs" -}}
- worker
{{- if eq .role "prefill" }}
- --is-prefill-worker
{{- else if eq .role "decode" }}
- --is-decode-worker
{{- else if eq .role "encode" }}
- --workers=0
- --encode=1
{{- end }}
- --start-timeout={{ int .worker.startTimeoutSeconds }}
{{- include "tandem.engineArgs" . }}
{{- if and (gt (int .worker.nodes) 1) (eq .worker.multiNodeStrategy "tensor") }}
{{- include "tandem.spanningArgs" (dict "context" . "rank" "0") }}
{{- else if gt (int .worker.nodes) 1 }}
{{- include "tandem.spreadArgs" . }}
{{- end }}
{{- end -}}

{{/* What leader and followers of one engine must have alike. */}}
{{- define "tandem.engineArgs" -}}
{{- if gt (int .worker.tensorParallelSize) 1 }}
- --tensor-parallel-size={{ int .worker.tensorParallelSize }}
{{- end }}
{{- if gt (int .worker.pipelineParallelSize) 1 }}
- --pipeline-parallel-size={{ int .worker.pipelineParallelSize }}
{{- end }}
{{- if gt (int .worker.dataParallelSize) 1 }}
- --data-parallel-size={{ int .worker.dataParallelSize }}
{{- end }}
{{- range .worker.args }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* An engine over several pods. Tandem's own engine defaults are spelled out, since a follower is vLLM's and doesn't know them. */}}
{{- define "tandem.spanningArgs" -}}
{{- $role := .context.role }}
- --nnodes={{ int .context.worker.nodes }}
- --node-rank={{ .rank }}
- --master-addr=$(LWS_LEADER_ADDRESS)
- --master-port=29501
- --distributed-executor-backend=mp
- --block-size=16
- --scheduling-policy=priority
- --enable-prefix-caching
{{- if ne $role "aggregated" }}
- --kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"{{ ternary "kv_producer" "kv_consumer" (eq $role "prefill") }}","kv_load_failure_policy":"recompute"}
{{- end }}
{{- end -}}

{{/* Ranks over several pods, each with its own server; --data-parallel-start-rank is computed in the pod. */}}
{{- define "tandem.spreadArgs" }}
- --data-parallel-hybrid-lb
- --data-parallel-size-local={{ div (int .worker.dataParallelSize) (int .worker.nodes) }}
- --data-parallel-address=$(LWS_LEADER_ADDRESS)
- --data-parallel-rpc-port=13445
{{- end -}}

{{- define "tandem.workerEnvironment" -}}
{{- $worker := .worker -}}
{{ include "tandem.commonEnvironment" .root }}
- name: TANDEM_WORKER_INDEX  # alone in its pod, so that all ports are the first of their kind
  value: "0"
- name: TANDEM_GRPC_URL
  value: $(POD_IP):8001
- name: VLLM_NIXL_SIDE_CHANNEL_HOST
  value: $(POD_IP)
- name: DYN_SYSTEM_HOST  # probes come from the node; the NetworkPolicy keeps others out
  value: 0.0.0.0
- name: DYN_HEALTH_CHECK_ENABLED
  value: {{ $worker.canary | quote }}
{{- with $worker.connector }}
- name: DYN_CONNECTOR
  value: {{ . | quote }}
{{- end }}
{{- with $worker.kvTiers.hostGB }}
- name: DYN_KVBM_CPU_CACHE_GB
  value: {{ . | quote }}
{{- end }}
{{- with $worker.kvTiers.diskGB }}
- name: DYN_KVBM_DISK_CACHE_GB
  value: {{ . | quote }}
- name: DYN_KVBM_DISK_CACHE_DIR
  value: /kv
{{- end }}
{{- if include "tandem.consolidated" . }}
- name: TANDEM_CONSOLIDATED_PORT  # a container beside it publishes; it starts none itself
  value: "57001"
{{- else if has "kvbm" (splitList " " $worker.connector) }}
- name: DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR
  value: "false"
{{- end }}
{{- if .root.Values.encode.enabled }}
- name: TANDEM_EMBEDDING_FOLDER
  value: /embeddings
- name: TANDEM_EMBEDDING_MAX_GB
  value: {{ .root.Values.encode.embeddings.maxGB | quote }}
- name: TANDEM_EMBEDDING_TTL_S
  value: {{ int .root.Values.encode.embeddings.ttlSeconds | quote }}
{{- end }}
{{- with $worker.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tandem.workerResources" -}}
{{- $resources := deepCopy .worker.resources -}}
{{- $limits := deepCopy ($resources.limits | default dict) -}}
{{- if eq .root.Values.platform "cuda" -}}
{{- $_ := set $limits .worker.gpuResource (include "tandem.gpusPerPod" .worker) -}}
{{- end -}}
{{- with .worker.rdmaResource -}}
{{- $_ := set $limits . "1" -}}
{{- end -}}
{{- toYaml (set $resources "limits" $limits) -}}
{{- end -}}

{{/* Told to leave, it serves on until proxies have left it out, then takes nothing new and finishes what it has. */}}
{{- define "tandem.workerPreStop" -}}
exec:
  command:
    - python
    - -c
    - >-
      import time, urllib.request as web;
      time.sleep({{ int .worker.leaveDelaySeconds }});
      web.urlopen(web.Request("http://127.0.0.1:8081/engine/drain", data=b'{"timeout_s": {{ int .worker.drainTimeoutSeconds }}}'), timeout={{ add (int .worker.drainTimeoutSeconds) 10 }})
{{- end -}}

{{- define "tandem.workerContainer" -}}
name: worker
image: {{ include "tandem.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- if and (gt (int .worker.nodes) 1) (eq .worker.multiNodeStrategy "data") }}
command: [tini, --, bash, -c, 'exec /opt/tandem/container/entrypoint.sh "$@" --data-parallel-start-rank=$((LWS_WORKER_INDEX * {{ div (int .worker.dataParallelSize) (int .worker.nodes) }}))', worker]
{{- end }}
args: {{- include "tandem.workerArgs" . | nindent 2 }}
env: {{- include "tandem.workerEnvironment" . | nindent 2 }}
ports:
  - {name: http, containerPort: 8000}
  - {name: grpc, containerPort: 8001}
  - {name: metrics, containerPort: 8002}
  - {name: admin, containerPort: 8081}
  - {name: nixl, containerPort: 5600}
  {{- if and .root.Values.router.enabled (not (has .role (list "decode" "encode"))) }}
  - {name: kv-events, containerPort: 20080}
  - {name: kv-replay, containerPort: 21080}
  {{- end }}
resources: {{- include "tandem.workerResources" . | nindent 2 }}
securityContext: {{- include "tandem.containerSecurity" .worker | nindent 2 }}
volumeMounts:
  {{- include "tandem.commonMounts" .root | nindent 2 }}
  {{- if .worker.kvTiers.diskGB }}
  - {name: kv, mountPath: /kv}
  {{- end }}
  {{- if .root.Values.encode.enabled }}
  - {name: embeddings, mountPath: /embeddings}
  {{- end }}
{{ include "tandem.probes" (dict "port" "admin" "startSeconds" .worker.startTimeoutSeconds) }}
lifecycle:
  preStop: {{- include "tandem.workerPreStop" . | nindent 4 }}
{{- end -}}

{{/* One stream of KV events over all tiers of the worker beside it. */}}
{{- define "tandem.consolidatorContainer" -}}
name: consolidator
image: {{ include "tandem.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args: [consolidator]
env:
  - {name: TANDEM_CONSOLIDATOR_WORKER_INDEX, value: "0"}
  - {name: TANDEM_CONSOLIDATOR_RANKS, value: {{ div (int .worker.dataParallelSize) (int .worker.nodes) | quote }}}
  - {name: TANDEM_CONSOLIDATOR_ENGINE, value: "tcp://127.0.0.1:20080"}
  - {name: TANDEM_CONSOLIDATOR_ENGINE_REPLAY, value: "tcp://127.0.0.1:21080"}
  - {name: TANDEM_CONSOLIDATOR_ADMIN_HOST, value: 0.0.0.0}
  - {name: TANDEM_CONSOLIDATOR_STATE, value: /state/kv-events}
ports:
  - {name: events, containerPort: 57001}
  - {name: replay, containerPort: 58001}
  - {name: events-admin, containerPort: 8481}
resources:
  requests: {cpu: 200m, memory: 512Mi}
  limits: {memory: 2Gi}
securityContext: {{- include "tandem.containerSecurity" dict | nindent 2 }}
volumeMounts:
  - {name: kv-events, mountPath: /state}
livenessProbe:
  httpGet: {path: /live, port: events-admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/* A follower of an engine over several pods: vLLM without a server. LeaderWorkerSet tells its rank and its leader. */}}
{{- define "tandem.followerContainer" -}}
name: follower
image: {{ include "tandem.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - vllm
  - serve
  - {{ .root.Values.model.name | quote }}
  - --headless
  {{- include "tandem.engineArgs" . | trim | nindent 2 }}
  {{- include "tandem.spanningArgs" (dict "context" . "rank" "$(LWS_WORKER_INDEX)") | trim | nindent 2 }}
env: {{- include "tandem.workerEnvironment" . | nindent 2 }}
resources: {{- include "tandem.workerResources" . | nindent 2 }}
securityContext: {{- include "tandem.containerSecurity" .worker | nindent 2 }}
volumeMounts:
  {{- include "tandem.commonMounts" .root | nindent 2 }}
{{- end -}}

{{/* The leader's name is in DNS some moments after its pod; whoever asks too early would give up. */}}
{{- define "tandem.waitForLeader" -}}
name: wait-for-leader
image: {{ include "tandem.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - bash
  - -c
  - >-
    for _ in $(seq 300); do getent hosts "$LWS_LEADER_ADDRESS" && exit 0; sleep 1; done;
    echo "$LWS_LEADER_ADDRESS is not in DNS after 300 s: look at the leader pod and the set's headless service" >&2; exit 1
securityContext: {{- include "tandem.containerSecurity" dict | nindent 2 }}
resources:
  requests: {cpu: 10m, memory: 32Mi}
{{- end -}}

{{/* Metadata and spec of a pod; "follower" true for one that only computes. */}}
{{- define "tandem.workerPod" -}}
metadata:
  labels:
    {{- include "tandem.podLabels" (dict "root" .root "values" .worker "component" .role) | nindent 4 }}
    {{- include "tandem.fleetLabels" . | nindent 4 }}
    tandem.dev/serves: {{ not .follower | quote }}
  {{- with .worker.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "tandem.podFields" (dict "root" .root "values" .worker "component" .role "follower" .follower) | nindent 2 }}
  terminationGracePeriodSeconds: {{ add (int .worker.leaveDelaySeconds) (int .worker.drainTimeoutSeconds) (int (include "tandem.exitSeconds" .)) }}
  {{- if gt (int .worker.nodes) 1 }}
  initContainers:
    - {{- include "tandem.waitForLeader" . | nindent 6 }}
  {{- end }}
  containers:
    {{- if .follower }}
    - {{- include "tandem.followerContainer" . | nindent 6 }}
    {{- else }}
    - {{- include "tandem.workerContainer" . | nindent 6 }}
    {{- if include "tandem.consolidated" . }}
    - {{- include "tandem.consolidatorContainer" . | nindent 6 }}
    {{- end }}
    {{- end }}
  volumes:
    {{- include "tandem.commonVolumes" (dict "root" .root "sharedMemory" .worker.sharedMemory) | nindent 4 }}
    {{- if .worker.kvTiers.diskGB }}
    - name: kv
      emptyDir: {}
    {{- end }}
    {{- if .root.Values.encode.enabled }}
    - name: embeddings
      persistentVolumeClaim: {claimName: {{ include "tandem.embeddingsClaim" .root }}}
    {{- end }}
    {{- if include "tandem.consolidated" . }}
    - name: kv-events
      emptyDir: {}
    {{- end }}
{{- end -}}

{{- define "tandem.embeddingsClaim" -}}
{{ .Values.encode.embeddings.existingClaim | default (printf "%s-embeddings" (include "tandem.fullname" .)) }}
{{- end -}}

{{/* Whoever scales the workers keeps his number over an upgrade; the values' number is for the first install. */}}
{{- define "tandem.workerReplicas" -}}
{{- $there := dict -}}
{{- if or .root.Values.planner.enabled (ne .worker.autoscaling.kind "none") -}}
{{- $there = lookup .apiVersion .kind .root.Release.Namespace (printf "%s-%s" (include "tandem.fullname" .root) .role) -}}
{{- end -}}
{{- int (dig "spec" "replicas" .worker.replicas $there) -}}
{{- end -}}
