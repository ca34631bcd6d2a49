{{/* SPDX-License-Identifier: Apache-2.0
Pieces of pods that several components share. */}}

{{/* Fields of a pod's spec: (dict "root" $ "values" VALUES "component" NAME); "follower" true for one that is not in discovery. */}}
{{- define "tandem.podFields" -}}
{{- $root := .root -}}
serviceAccountName: {{ include "tandem.account" . }}
automountServiceAccountToken: {{ and (eq $root.Values.discovery.kind "kubernetes") (not .follower) }}
enableServiceLinks: false
securityContext: {{- toYaml $root.Values.podSecurityContext | nindent 2 }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "tandem.affinity" . }}
affinity: {{- . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if (.values.topologySpread).enabled }}
topologySpreadConstraints:
  - maxSkew: {{ int .values.topologySpread.maxSkew }}
    topologyKey: {{ .values.topologySpread.topologyKey }}
    whenUnsatisfiable: {{ .values.topologySpread.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- include "tandem.selector" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
{{- end }}
{{- end -}}

{{/* The given affinity; discovery in a folder needs all pods on one node. */}}
{{- define "tandem.affinity" -}}
{{- if .values.affinity -}}
{{- toYaml .values.affinity -}}
{{- else if eq .root.Values.discovery.kind "folder" -}}
podAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    - topologyKey: kubernetes.io/hostname
      labelSelector:
        matchLabels:
          {{- include "tandem.selector" .root | nindent 10 }}
          tandem.dev/together: "true"
{{- end -}}
{{- end -}}

{{/* Labels of a pod: (dict "root" $ "values" VALUES "component" NAME). */}}
{{- define "tandem.podLabels" -}}
{{ include "tandem.labels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- if eq .root.Values.discovery.kind "folder" }}
tandem.dev/together: "true"
{{- end }}
{{- with .values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tandem.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  {{- with .rdmaResource }}
  add: [IPC_LOCK]  # RDMA pins memory
  {{- end }}
{{- end -}}

{{/* Environment of workers and routers: the address first, since others refer to it. */}}
{{- define "tandem.commonEnvironment" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: TANDEM_MODEL
  value: {{ .Values.model.name | quote }}
{{- with include "tandem.discoveryUrl" . }}
- name: TANDEM_DISCOVERY
  value: {{ . | quote }}
{{- else }}
- name: TANDEM_DISCOVERY
  value: ""
{{- end }}
{{- if eq .Values.discovery.kind "kubernetes" }}
- name: POD_NAME  # with its uid: the pod owns its Leases, which go with it
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_UID
  valueFrom: {fieldRef: {fieldPath: metadata.uid}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
{{- end }}
- name: HF_HOME
  value: {{ .Values.model.cache.mountPath }}
- name: VLLM_CACHE_ROOT
  value: {{ .Values.model.cache.mountPath }}/vllm
{{- if .Values.model.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- with .Values.model.tokenSecret }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.model.tokenKey }}}}
{{- end }}
{{- if eq .Values.platform "cpu" }}
- name: TANDEM_PLATFORM
  value: cpu
{{- end }}
{{- end -}}

{{- define "tandem.commonMounts" -}}
- {name: shared-memory, mountPath: /dev/shm}
- {name: models, mountPath: {{ .Values.model.cache.mountPath }}}
{{- if eq .Values.discovery.kind "folder" }}
- {name: discovery, mountPath: /discovery}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "sharedMemory" SIZE). */}}
{{- define "tandem.commonVolumes" -}}
{{- $cache := .root.Values.model.cache -}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .sharedMemory }}}
- name: models
  {{- if eq $cache.kind "claim" }}
  persistentVolumeClaim: {claimName: {{ $cache.existingClaim | default (printf "%s-models" (include "tandem.fullname" .root)) }}}
  {{- else if eq $cache.kind "hostPath" }}
  hostPath: {path: {{ $cache.hostPath }}, type: DirectoryOrCreate}
  {{- else }}
  emptyDir: {sizeLimit: {{ $cache.sizeLimit }}}
  {{- end }}
{{- if eq .root.Values.discovery.kind "folder" }}
- name: discovery
  persistentVolumeClaim: {claimName: {{ .root.Values.discovery.folderClaim }}}
{{- end }}
{{- end -}}

{{/* Probes on an admin server: (dict "port" NAME "startSeconds" N). Restarts follow /live, traffic follows /health. */}}
{{- define "tandem.probes" -}}
startupProbe:
  httpGet: {path: /live, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ max 1 (div (add (int .startSeconds) 9) 10) }}
livenessProbe:
  httpGet: {path: /live, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /health, port: {{ .port }}}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end -}}

{{/* A budget for voluntary disruptions: (dict "root" $ "values" VALUES "component" NAME). */}}
{{- define "tandem.disruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "tandem.fullname" .root }}-{{ .component }}
  labels: {{- include "tandem.labels" .root | nindent 4 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "tandem.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
{{- end -}}
