{{/* SPDX-License-Identifier: Apache-2.0
Peers in NetworkPolicies. */}}

{{- define "tandem.peer" -}}
- podSelector:
    matchLabels:
      {{- include "tandem.selector" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "tandem.prometheusPeer" -}}
- namespaceSelector:
    matchLabels: {{- toYaml .Values.networkPolicy.prometheusNamespaceLabels | nindent 6 }}
{{- end -}}

{{/* Whoever may ask for text, besides our own test and our own gateway. */}}
{{- define "tandem.clientsIngress" -}}
- ports: [{port: 8000}, {port: 8001}]
  {{- with .Values.networkPolicy.clients }}
  from:
    {{- toYaml . | nindent 4 }}
    {{- include "tandem.peer" (dict "root" $ "component" "test") | nindent 4 }}
    {{- if eq $.Values.gateway.kind "standalone" }}
    {{- include "tandem.peer" (dict "root" $ "component" "gateway") | nindent 4 }}
    {{- end }}
  {{- end }}
{{- end -}}

{{/* The Gateway and host names of a route. */}}
{{- define "tandem.routeParents" -}}
parentRefs:
  - name: {{ .Values.gateway.name }}
    {{- with .Values.gateway.namespace }}
    namespace: {{ . }}
    {{- end }}
{{- with .Values.gateway.hostnames }}
hostnames: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
