{{/* SPDX-License-Identifier: Apache-2.0
Values that contradict each other stop the rendering with one sentence, which says the fix. Types and typos are the schema's. */}}

{{- define "tandem.checks" -}}
{{- include "tandem.checkFleet" . -}}
{{- include "tandem.checkModel" . -}}
{{- include "tandem.checkDiscovery" . -}}
{{- include "tandem.checkGateway" . -}}
{{- include "tandem.checkEnvironment" (list "router" .Values.router.env) -}}
{{- include "tandem.checkEnvironment" (list "planner" .Values.planner.env) -}}
{{- if ne .Values.mode "agg" -}}
{{- include "tandem.checkSpeculation" . -}}
{{- end -}}
{{- include "tandem.checkEncode" . -}}
{{- range $role := splitList " " (include "tandem.roles" .) -}}
{{- $context := dict "root" $ "role" $role "worker" (include "tandem.workerValues" (dict "root" $ "role" $role) | fromYaml) -}}
{{- include "tandem.checkParallel" $context -}}
{{- include "tandem.checkConnector" $context -}}
{{- include "tandem.checkMemory" $context -}}
{{- include "tandem.checkScaling" $context -}}
{{- include "tandem.checkArguments" $context -}}
{{- include "tandem.checkEnvironment" (list (printf "roles.%s" $role) $context.worker.env) -}}
{{- end -}}
{{- end -}}

{{/* A draft's KV blocks travel with the model's, so both roles must guess alike. */}}
{{- define "tandem.checkSpeculation" -}}
{{- $prefill := include "tandem.workerValues" (dict "root" . "role" "prefill") | fromYaml -}}
{{- $decode := include "tandem.workerValues" (dict "root" . "role" "decode") | fromYaml -}}
{{- $one := include "tandem.speculation" $prefill.args -}}
{{- $other := include "tandem.speculation" $decode.args -}}
{{- if ne $one $other -}}
{{- fail (printf "prefill speculates by %s and decode by %s, and only workers that speculate alike are paired: give both the same, in worker.args" ($one | default "nothing") ($other | default "nothing")) -}}
{{- end -}}
{{- end -}}

{{/* ARGS: those about speculation, one after the other. */}}
{{- define "tandem.speculation" -}}
{{- $names := list "--speculative-config" "--spec-method" "--spec-model" "--spec-tokens" -}}
{{- $found := list -}}
{{- $taken := false -}}
{{- range . -}}
{{- if or $taken (has (index (splitList "=" .) 0) $names) -}}
{{- $found = concat $found (splitList "=" .) -}}
{{- end -}}
{{- $taken = has . $names -}}
{{- end -}}
{{- join " " $found -}}
{{- end -}}

{{- define "tandem.checkFleet" -}}
{{- $values := .Values -}}
{{- if and (eq $values.mode "disagg") (not $values.router.enabled) -}}
{{- fail "mode disagg needs a router, which chains prefill and decode: set router.enabled=true" -}}
{{- end -}}
{{- if and $values.planner.enabled (not $values.router.enabled) -}}
{{- fail "the planner reads the routers' metrics: set router.enabled=true, or planner.enabled=false" -}}
{{- end -}}
{{- range $role := ternary (list "prefill" "decode") (list "aggregated") (eq $values.mode "agg") -}}
{{- if get $values.roles $role -}}
{{- fail (printf "roles.%s has values, but mode %s has no such workers: remove them, or choose the other mode" $role $values.mode) -}}
{{- end -}}
{{- end -}}
{{- if and $values.image.tag $values.image.digest -}}
{{- fail "image.tag and image.digest exclude each other: remove one of them" -}}
{{- end -}}
{{- if eq (int $values.service.httpPort) (int $values.service.grpcPort) -}}
{{- fail (printf "service.httpPort and service.grpcPort are both %d: give each its own" (int $values.service.httpPort)) -}}
{{- end -}}
{{- if and $values.networkPolicy.enabled (not $values.networkPolicy.prometheusNamespaceLabels) -}}
{{- fail "networkPolicy.prometheusNamespaceLabels is empty, which would open the admin ports to every namespace: name Prometheus' namespace by its labels" -}}
{{- end -}}
{{- end -}}

{{/* Encode workers, and the folder that all workers share with them. */}}
{{- define "tandem.checkEncode" -}}
{{- $values := .Values -}}
{{- $embeddings := $values.encode.embeddings -}}
{{- if and $values.encode.enabled (not $values.router.enabled) -}}
{{- fail "encode workers are asked by a router before the others: set router.enabled=true, or encode.enabled=false" -}}
{{- end -}}
{{- if and $values.roles.encode (not $values.encode.enabled) -}}
{{- fail "roles.encode has values, but there are no such workers: set encode.enabled=true, or remove them" -}}
{{- end -}}
{{- if and $values.planner.maxEncode (not (and $values.encode.enabled $values.planner.enabled)) -}}
{{- fail "planner.maxEncode is for a planner with encode workers: set encode.enabled=true and planner.enabled=true, or maxEncode=0" -}}
{{- end -}}
{{- if and $embeddings.existingClaim (not $values.encode.enabled) -}}
{{- fail "encode.embeddings.existingClaim is for encode workers, and there are none: set encode.enabled=true, or remove the claim" -}}
{{- end -}}
{{- if $values.encode.enabled -}}
{{- include "tandem.checkEncodeWorkers" . -}}
{{- $room := mulf $embeddings.maxGB 953.674 | ceil | int -}}
{{- if and (not $embeddings.existingClaim) (lt (include "tandem.mebibytes" (toString $embeddings.size) | int) $room) -}}
{{- fail (printf "encode.embeddings.size %s has no room for maxGB %v: raise it, or lower maxGB" $embeddings.size $embeddings.maxGB) -}}
{{- end -}}
{{- if and (not $embeddings.existingClaim) (eq $embeddings.accessMode "ReadWriteOnce") (ne $values.discovery.kind "folder") -}}
{{- fail "encode.embeddings.accessMode ReadWriteOnce can't be mounted on several nodes: use ReadWriteMany, or existingClaim with a claim of one node" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkEncodeWorkers" -}}
{{- range $role := splitList " " (include "tandem.roles" .) -}}
{{- $worker := include "tandem.workerValues" (dict "root" $ "role" $role) | fromYaml -}}
{{- if and (eq $role "encode") (or $worker.connector $worker.kvTiers.hostGB $worker.kvTiers.diskGB) -}}
{{- fail "roles.encode: an encode worker has no KV: remove connector and kvTiers" -}}
{{- end -}}
{{- if and (eq $role "encode") (or (gt (int $worker.nodes) 1) (gt (int $worker.dataParallelSize) 1)) -}}
{{- fail "roles.encode: an encode worker is one engine in one pod: set replicas instead of nodes and dataParallelSize" -}}
{{- end -}}
{{- if and (gt (int $worker.nodes) 1) (eq $worker.multiNodeStrategy "tensor") -}}
{{- fail (printf "%s: an engine over several nodes takes no embeddings, since its followers know nothing of them: set encode.enabled=false, or nodes=1" $role) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkModel" -}}
{{- $model := .Values.model -}}
{{- if and $model.offline $model.tokenSecret -}}
{{- fail "model.offline never asks the hub, so model.tokenSecret has no use: remove one of them" -}}
{{- end -}}
{{- if and $model.offline (eq $model.cache.kind "emptyDir") (not (hasPrefix "/" $model.name)) -}}
{{- fail "model.offline with an empty cache finds no model: set model.cache.kind to claim or hostPath with the model in it" -}}
{{- end -}}
{{- if and (eq $model.cache.kind "hostPath") (not $model.cache.hostPath) -}}
{{- fail "model.cache.kind hostPath needs model.cache.hostPath, a folder of each node" -}}
{{- end -}}
{{- if and $model.cache.hostPath (ne $model.cache.kind "hostPath") -}}
{{- fail (printf "model.cache.hostPath is for the kind hostPath, and the kind is %s: set model.cache.kind=hostPath, or remove the path" $model.cache.kind) -}}
{{- end -}}
{{- if and $model.cache.existingClaim (ne $model.cache.kind "claim") -}}
{{- fail (printf "model.cache.existingClaim is for the kind claim, and the kind is %s: set model.cache.kind=claim, or remove the claim" $model.cache.kind) -}}
{{- end -}}
{{- $alone := and (eq .Values.mode "agg") (not .Values.router.enabled) (eq (int .Values.worker.replicas) 1) -}}
{{- if and (eq $model.cache.kind "claim") (not $model.cache.existingClaim) (eq $model.cache.accessMode "ReadWriteOnce") (not $alone) (ne .Values.discovery.kind "folder") -}}
{{- fail "model.cache.accessMode ReadWriteOnce can't be mounted on several nodes: use ReadWriteMany, or model.cache.kind=emptyDir" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkDiscovery" -}}
{{- $discovery := .Values.discovery -}}
{{- if and .Values.router.enabled (eq $discovery.kind "none") -}}
{{- fail "a router finds its workers in discovery: set discovery.kind to etcd or kubernetes" -}}
{{- end -}}
{{- if and (eq $discovery.kind "kubernetes") (not .Values.router.enabled) -}}
{{- fail "discovery.kind kubernetes is for routers, and there is none: set router.enabled=true, or discovery.kind=none" -}}
{{- end -}}
{{- if and (eq $discovery.kind "kubernetes") $discovery.prefix -}}
{{- fail "discovery.prefix is for etcd and folders; in Kubernetes the fleet is the release's name and namespace: remove it, or set discovery.kind=etcd" -}}
{{- end -}}
{{- if and (ne (int $discovery.kubernetes.leaseSeconds) 10) (ne $discovery.kind "kubernetes") -}}
{{- fail (printf "discovery.kubernetes.leaseSeconds is for the kind kubernetes, and the kind is %s: set discovery.kind=kubernetes, or remove it" $discovery.kind) -}}
{{- end -}}
{{- if and $discovery.etcd.endpoint (ne $discovery.kind "etcd") -}}
{{- fail (printf "discovery.etcd.endpoint is for the kind etcd, and the kind is %s: set discovery.kind=etcd, or remove the endpoint" $discovery.kind) -}}
{{- end -}}
{{- if and (eq $discovery.kind "folder") (not $discovery.folderClaim) -}}
{{- fail "discovery.kind folder needs discovery.folderClaim, a claim that all pods mount" -}}
{{- end -}}
{{- if and $discovery.folderClaim (ne $discovery.kind "folder") -}}
{{- fail (printf "discovery.folderClaim is for the kind folder, and the kind is %s: set discovery.kind=folder, or remove the claim" $discovery.kind) -}}
{{- end -}}
{{- if and (eq $discovery.kind "folder") (or .Values.worker.affinity .Values.router.affinity) -}}
{{- fail "discovery.kind folder keeps all pods on one node by an affinity of its own: remove worker.affinity and router.affinity, or use etcd" -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkGateway" -}}
{{- $gateway := .Values.gateway -}}
{{- if and (has $gateway.kind (list "route" "inferencePool")) (not $gateway.name) -}}
{{- fail (printf "gateway.kind %s needs gateway.name, the Gateway that its routes attach to" $gateway.kind) -}}
{{- end -}}
{{- if and (has $gateway.kind (list "none" "standalone")) $gateway.name -}}
{{- fail (printf "gateway.name is for the kinds route and inferencePool, and the kind is %s: remove it, or choose another kind" $gateway.kind) -}}
{{- end -}}
{{- if and (has $gateway.kind (list "inferencePool" "standalone")) (not .Values.router.enabled) -}}
{{- fail (printf "gateway.kind %s puts its picker in front of routers: set router.enabled=true, or gateway.kind=route" $gateway.kind) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkParallel" -}}
{{- $worker := .worker -}}
{{- $nodes := int $worker.nodes -}}
{{- $engine := mul (int $worker.tensorParallelSize) (int $worker.pipelineParallelSize) | int -}}
{{- $ranks := int $worker.dataParallelSize -}}
{{- if gt $nodes 1 -}}
{{- if eq .root.Values.platform "cpu" -}}
{{- fail (printf "%s: engines over several nodes need GPUs: set nodes=1, or platform=cuda" .role) -}}
{{- end -}}
{{- if eq $worker.multiNodeStrategy "tensor" -}}
{{- if gt $ranks 1 -}}
{{- fail (printf "%s: multiNodeStrategy tensor is for one engine, and dataParallelSize is %d: set it to 1, or multiNodeStrategy=data" .role $ranks) -}}
{{- end -}}
{{- if ne (mod $engine $nodes) 0 -}}
{{- fail (printf "%s: %d GPUs (tensorParallelSize x pipelineParallelSize) can't be shared equally by %d nodes: make it a multiple" .role $engine $nodes) -}}
{{- end -}}
{{- if or $worker.kvTiers.hostGB $worker.kvTiers.diskGB (has "kvbm" (splitList " " $worker.connector)) -}}
{{- fail (printf "%s: KV tiers don't span nodes: set nodes=1, or remove kvTiers and the connector kvbm" .role) -}}
{{- end -}}
{{- else if ne (mod $ranks $nodes) 0 -}}
{{- fail (printf "%s: dataParallelSize %d can't be shared equally by %d nodes: make it a multiple" .role $ranks $nodes) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkConnector" -}}
{{- $worker := .worker -}}
{{- $names := without (splitList " " $worker.connector) "" -}}
{{- $tiers := or $worker.kvTiers.hostGB $worker.kvTiers.diskGB -}}
{{- if and (ne .role "aggregated") $names (not (has "nixl" $names)) -}}
{{- fail (printf "%s: connector %q can't hand KV over: add nixl to it" .role $worker.connector) -}}
{{- end -}}
{{- if ne (len $names) (len (uniq $names)) -}}
{{- fail (printf "%s: connector %q names one twice: name each once" .role $worker.connector) -}}
{{- end -}}
{{- if and $tiers (not (has "kvbm" $names)) -}}
{{- fail (printf "%s: kvTiers are those of the connector kvbm: add kvbm to connector, or remove kvTiers" .role) -}}
{{- end -}}
{{- if and (has "kvbm" $names) (not $tiers) (not (include "tandem.hasTierVariable" $worker)) -}}
{{- fail (printf "%s: the connector kvbm has no tier: set kvTiers.hostGB or kvTiers.diskGB" .role) -}}
{{- end -}}
{{- if and (has "lmcache" $names) (eq .root.Values.platform "cpu") -}}
{{- fail (printf "%s: LMCache moves no KV blocks on CPUs: choose the connector kvbm" .role) -}}
{{- end -}}
{{- if and $worker.rdmaResource (eq .root.Values.platform "cpu") -}}
{{- fail (printf "%s: rdmaResource is for GPUs: remove it, or set platform=cuda" .role) -}}
{{- end -}}
{{- end -}}

{{/* Whether a tier is asked for by environment, as the object tier is. */}}
{{- define "tandem.hasTierVariable" -}}
{{- range .env -}}{{- if hasPrefix "DYN_KVBM_" .name -}}true{{- end -}}{{- end -}}
{{- end -}}

{{- define "tandem.checkMemory" -}}
{{- $shm := include "tandem.mebibytes" .worker.sharedMemory | int -}}
{{- $host := mulf .worker.kvTiers.hostGB 953.674 | ceil | int -}}
{{- if lt $shm (add $host 1024 | int) -}}
{{- fail (printf "%s: sharedMemory %s is too small: the engine needs 1Gi of it, and the host tier %v GB (kvTiers.hostGB); raise it" .role .worker.sharedMemory .worker.kvTiers.hostGB) -}}
{{- end -}}
{{- with (.worker.resources.limits).memory -}}
{{- if lt (include "tandem.mebibytes" (toString .) | int) $shm -}}
{{- fail (printf "%s: the memory limit %v is below sharedMemory %s, which counts to it: raise the limit" $.role . $.worker.sharedMemory) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A quantity in MiB; nothing for units that are not looked at. */}}
{{- define "tandem.mebibytes" -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $factors := dict "Mi" 1.0 "Gi" 1024.0 "Ti" 1048576.0 "M" 0.953674 "G" 953.674 "T" 953674.0 -}}
{{- mulf $number (get $factors $unit | default 0.00000095) | floor -}}
{{- end -}}

{{- define "tandem.checkScaling" -}}
{{- $scaling := .worker.autoscaling -}}
{{- if and .root.Values.planner.enabled (ne $scaling.kind "none") (has .role (splitList " " (include "tandem.plannedRoles" .root))) -}}
{{- fail (printf "%s: planner and autoscaling would scale against each other: set autoscaling.kind=none, or planner.enabled=false" .role) -}}
{{- end -}}
{{- if and (ne $scaling.kind "none") (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s: autoscaling.minReplicas %d is above maxReplicas %d: swap or correct them" .role (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq $scaling.kind "keda") (not $scaling.prometheusUrl) -}}
{{- fail (printf "%s: autoscaling.kind keda asks Prometheus: set autoscaling.prometheusUrl" .role) -}}
{{- end -}}
{{- end -}}

{{- define "tandem.checkArguments" -}}
{{- $ours := dict "--tensor-parallel-size" "tensorParallelSize" "--pipeline-parallel-size" "pipelineParallelSize" "--data-parallel-size" "dataParallelSize"
  "--nnodes" "nodes" "--node-rank" "nodes" "--master-addr" "nodes" "--data-parallel-hybrid-lb" "multiNodeStrategy" "--data-parallel-size-local" "nodes"
  "--data-parallel-start-rank" "nodes" "--data-parallel-address" "nodes" "--is-prefill-worker" "mode" "--is-decode-worker" "mode" "--mode" "mode"
  "--workers" "replicas" "--encode" "encode.enabled" "--routers" "router.replicas" "--model" "model.name" "--connector" "connector" "--kv-transfer-config" "connector"
  "--discovery" "discovery" "--start-timeout" "startTimeoutSeconds" -}}
{{- $fixed := list "--http-port" "--grpc-port" "--metrics-port" "--admin-port" "--admin-host" "--kv-event-port" "--side-channel-port" "--grpc-url" "--detach" -}}
{{- range .worker.args -}}
{{- $flag := index (splitList "=" .) 0 -}}
{{- with get $ours $flag -}}
{{- fail (printf "%s: the argument %s is the chart's: set %s instead" $.role $flag .) -}}
{{- end -}}
{{- if has $flag $fixed -}}
{{- fail (printf "%s: the argument %s is fixed, since services, probes and policies rest on it: remove it" $.role $flag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (list WHERE ENV) */}}
{{- define "tandem.checkEnvironment" -}}
{{- $where := index . 0 -}}
{{- $fixed := list "POD_IP" "POD_NAME" "POD_UID" "POD_NAMESPACE" "TANDEM_MODEL" "TANDEM_ROLE" "TANDEM_DISCOVERY" "TANDEM_GRPC_URL" "TANDEM_WORKER_INDEX" "TANDEM_PLATFORM" "TANDEM_CONSOLIDATED_PORT"
  "DYN_SYSTEM_HOST" "DYN_SYSTEM_PORT" "DYN_CONNECTOR" "DYN_VLLM_KV_EVENT_PORT" "DYN_VLLM_IS_PREFILL_WORKER" "DYN_VLLM_IS_DECODE_WORKER" "DYN_HEALTH_CHECK_ENABLED"
  "DYN_KVBM_CPU_CACHE_GB" "DYN_KVBM_DISK_CACHE_GB" "VLLM_NIXL_SIDE_CHANNEL_HOST" "VLLM_NIXL_SIDE_CHANNEL_PORT" "HF_HOME" "HF_TOKEN" "HF_HUB_OFFLINE"
  "TANDEM_EMBEDDING_FOLDER" "TANDEM_EMBEDDING_MAX_GB" "TANDEM_EMBEDDING_TTL_S"
  "DYN_ROUTER_MODE" "DYN_KV_EVENTS" "DYN_ROUTER_REPLICA_SYNC" "TANDEM_ROUTER_REPLICA_HOST" "TANDEM_ROUTER_REPLICA_PORT" "TANDEM_ROUTER_ADMIN_HOST" "TANDEM_ROUTER_ADMIN_PORT"
  "PROMETHEUS_ENDPOINT" "TANDEM_PLANNER_MODE" "TANDEM_PLANNER_PROFILE_RESULTS_DIR" "TANDEM_PLANNER_CONNECTOR" "TANDEM_PLANNER_MAX_ENCODE" "TANDEM_PLANNER_FLEET" "TANDEM_PLANNER_NAMESPACE" "TANDEM_PLANNER_STATE" "TANDEM_PLANNER_ADMIN_HOST" "TANDEM_PLANNER_ADMIN_PORT" -}}
{{- $seen := list -}}
{{- range index . 1 -}}
{{- if has .name $fixed -}}
{{- fail (printf "%s: env has %s, which the chart sets itself: remove it, and use the value for it" $where .name) -}}
{{- end -}}
{{- if has .name $seen -}}
{{- fail (printf "%s: env has %s twice: keep one" $where .name) -}}
{{- end -}}
{{- $seen = append $seen .name -}}
{{- end -}}
{{- end -}}
