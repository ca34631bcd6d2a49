{{/* SPDX-License-Identifier: Apache-2.0
What the planner is told. */}}

{{/* The roles that it scales. */}}
{{- define "tandem.plannedRoles" -}}
{{- $roles := splitList " " (include "tandem.roles" .) -}}
{{- join " " (ternary $roles (without $roles "encode") (gt (int .Values.planner.maxEncode) 0)) -}}
{{- end -}}

{{- define "tandem.plannerArgs" -}}
- planner
{{- range .Values.planner.args }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "tandem.plannerEnvironment" -}}
- name: TANDEM_PLANNER_CONNECTOR
  value: kubernetes
- name: TANDEM_PLANNER_FLEET
  value: {{ include "tandem.fullname" . }}
- name: TANDEM_PLANNER_NAMESPACE
  value: {{ .Release.Namespace }}
- name: PROMETHEUS_ENDPOINT
  value: {{ .Values.planner.prometheusUrl | quote }}
- name: TANDEM_DISCOVERY
  value: {{ include "tandem.discoveryUrl" . | quote }}
- name: TANDEM_PLANNER_MODE
  value: {{ .Values.mode }}
{{- range $role := splitList " " (include "tandem.plannedRoles" .) }}
{{- $worker := include "tandem.workerValues" (dict "root" $ "role" $role) | fromYaml }}
- name: TANDEM_PLANNER_{{ get (dict "prefill" "PREFILL" "encode" "ENCODE") $role | default "DECODE" }}_ENGINE_NUM_GPU  # aggregated engines count as decode's
  value: {{ mul (int (include "tandem.gpusPerPod" $worker)) (int $worker.nodes) | quote }}
{{- end }}
{{- with .Values.planner.maxEncode }}
- name: TANDEM_PLANNER_MAX_ENCODE
  value: {{ . | quote }}
{{- end }}
{{- if .Values.planner.profileConfigMap }}
- name: TANDEM_PLANNER_PROFILE_RESULTS_DIR
  value: /profile
{{- end }}
- name: TANDEM_PLANNER_STATE
  value: /state/planner.json
- name: TANDEM_PLANNER_ADMIN_HOST  # probes come from the node; the NetworkPolicy keeps others out
  value: 0.0.0.0
{{- with .Values.planner.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
