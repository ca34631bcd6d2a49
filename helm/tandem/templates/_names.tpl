{{/* SPDX-License-Identifier: Apache-2.0
Names, labels, and what more than one component says in the same words. */}}

{{- define "tandem.fullname" -}}
{{- if .Values.fullnameOverride -}}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains "tandem" .Release.Name -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-tandem" .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{/* What never changes in a release, so it may stand in selectors. */}}
{{- define "tandem.selector" -}}
app.kubernetes.io/name: tandem
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tandem.labels" -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The planner finds its pools by these two on the workload. */}}
{{- define "tandem.fleetLabels" -}}
tandem.dev/fleet: {{ include "tandem.fullname" .root }}
tandem.dev/role: {{ .role }}
{{- end -}}

{{- define "tandem.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}
{{- else -}}{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The second of two maps over the first, key by key, as YAML. Unlike sprig's mergeOverwrite it also takes false, 0 and "". */}}
{{- define "tandem.merge" -}}
{{- $merged := deepCopy (index . 0) -}}
{{- range $key, $value := index . 1 -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $merged $key)) -}}
{{- $_ := set $merged $key (include "tandem.merge" (list (get $merged $key) $value) | fromYaml) -}}
{{- else -}}
{{- $_ := set $merged $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end -}}

{{/* The roles of this mode, with blanks between. */}}
{{- define "tandem.roles" -}}
{{ ternary "aggregated" "prefill decode" (eq .Values.mode "agg") }}{{ if .Values.encode.enabled }} encode{{ end }}
{{- end -}}

{{/* `worker` with the changes of one role, as YAML: (dict "root" $ "role" "prefill"). What an encode worker can't have it doesn't inherit. */}}
{{- define "tandem.workerValues" -}}
{{- $worker := .root.Values.worker -}}
{{- if eq .role "encode" -}}
{{- $without := dict "connector" "" "kvTiers" (dict "hostGB" 0 "diskGB" 0 "consolidator" false) "nodes" 1 "dataParallelSize" 1 -}}
{{- $worker = include "tandem.merge" (list $worker $without) | fromYaml -}}
{{- end -}}
{{- include "tandem.merge" (list $worker (get .root.Values.roles .role)) -}}
{{- end -}}

{{/* Pods of one engine, GPUs of one pod, and data-parallel ranks of one pod. */}}
{{- define "tandem.gpusPerPod" -}}
{{- $all := mul (int .tensorParallelSize) (int .pipelineParallelSize) (int .dataParallelSize) -}}
{{- div $all (int .nodes) -}}
{{- end -}}

{{- define "tandem.discoveryUrl" -}}
{{- $prefix := .Values.discovery.prefix | default (printf "%s/%s" .Release.Namespace .Release.Name) -}}
{{- if eq .Values.discovery.kind "etcd" -}}
{{- $endpoint := .Values.discovery.etcd.endpoint | default (printf "%s-etcd.%s.svc:2379" (include "tandem.fullname" .) .Release.Namespace) -}}
etcd://{{ $endpoint }}/{{ $prefix }}
{{- else if eq .Values.discovery.kind "folder" -}}
file:/discovery/{{ $prefix }}
{{- else if eq .Values.discovery.kind "kubernetes" -}}
kubernetes://{{ .Release.Namespace }}/{{ include "tandem.fullname" . }}?lease_s={{ int .Values.discovery.kubernetes.leaseSeconds }}
{{- end -}}
{{- end -}}

{{/* Under which account a component's pods run: (dict "root" $ "component" NAME). Routers may more than workers where they look into Leases. */}}
{{- define "tandem.account" -}}
{{ include "tandem.fullname" .root }}{{ if and (eq .component "router") (eq .root.Values.discovery.kind "kubernetes") }}-router{{ end }}
{{- end -}}

{{/* Where requests go in: routers if there are any. */}}
{{- define "tandem.frontRole" -}}
{{ ternary "router" "aggregated" .Values.router.enabled }}
{{- end -}}

{{- define "tandem.frontModel" -}}
{{ ternary "router" "vllm" .Values.router.enabled }}
{{- end -}}

{{/* Whether a role has a consolidator beside its worker: (dict "root" $ "role" .. "worker" ..). Decode workers publish no events. */}}
{{- define "tandem.consolidated" -}}
{{- if and (has "kvbm" (splitList " " .worker.connector)) .worker.kvTiers.consolidator (ne .role "decode") .root.Values.router.enabled -}}
true
{{- end -}}
{{- end -}}

{{/* What Triton takes at most to exit, and a little more. */}}
{{- define "tandem.exitSeconds" -}}70{{- end -}}
