// A driver library that says yes, and counts the kernels that Triton launches.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static long launches;
static char *names[20000];
static long counts[20000];
static int n;
long nullcu_launches() { return launches; }
void nullcu_reset() {
  launches = 0;
  memset(counts, 0, sizeof counts);
}
void nullcu_report() {
  fprintf(stderr, "nullcu: %ld Triton launches\n", launches);
  for (int i = 1; i <= n; i++)
    if (counts[i])
      fprintf(stderr, "  %6ld %s\n", counts[i], names[i]);
}
static double cc() {
  char *v = getenv("NULLCUDA_CC");
  return v ? atof(v) : 9.0;
}
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int *v) {
  *v = 13000;
  return 0;
}
int cuDeviceGetCount(int *k) {
  *k = 1;
  return 0;
}
int cuDeviceGet(int *d, int o) {
  *d = o;
  return 0;
}
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) {
  if (f)
    *f = 0;
  if (a)
    *a = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) {
  *c = (void *)1;
  return 0;
}
int cuCtxGetCurrent(void **c) {
  *c = (void *)1;
  return 0;
}
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxGetDevice(int *d) {
  *d = 0;
  return 0;
}
int cuCtxGetLimit(size_t *v, int l) {
  *v = 8 << 20;
  return 0;
}
int cuCtxSetLimit(int l, size_t v) { return 0; }
int cuGetErrorString(int e, const char **s) {
  *s = "null";
  return 0;
}
int cuGetErrorName(int e, const char **s) {
  *s = "null";
  return 0;
}
int cuDeviceGetAttribute(int *v, int a, int d) {
  switch (a) {
  case 97:
    *v = cc() >= 9 ? 232448 : 166912;
    break;
  case 8:
    *v = 49152;
    break;
  case 16:
    *v = 132;
    break;
  case 10:
    *v = 32;
    break;
  case 12:
  case 82:
    *v = 65536;
    break;
  case 13:
    *v = 1980000;
    break;
  case 36:
    *v = 2600000;
    break;
  case 37:
    *v = 5120;
    break;
  case 75:
    *v = (int)cc();
    break;
  case 76:
    *v = (int)((cc() - (int)cc()) * 10 + .5);
    break;
  default:
    *v = 1;
  }
  return 0;
}
int cuModuleLoadData(void **m, const void *i) {
  *m = (void *)1;
  return 0;
}
int cuModuleGetFunction(void **f, void *m, const char *name) {
  if (n < 19999)
    n++;
  names[n] = strdup(name);
  *f = (void *)(long)n;
  return 0;
}
int cuModuleUnload() { return 0; }
static void one(void *f) {
  launches++;
  long i = (long)f;
  if (i > 0 && i <= n)
    counts[i]++;
}
int cuLaunchKernel(void *f) {
  one(f);
  return 0;
}
int cuLaunchKernelEx(void *c, void *f) {
  one(f);
  return 0;
}
int cuFuncGetAttribute(int *v, int a, void *f) {
  *v = a == 0 ? 1024 : a == 4 ? 32 : 0;
  return 0;
}
int cuFuncSetAttribute() { return 0; }
int cuFuncSetCacheConfig() { return 0; }
int cuPointerGetAttribute(void *d, int a, unsigned long p) {
  *(unsigned long *)d = p;
  return 0;
}
int cuOccupancyMaxActiveClusters(int *k) {
  *k = 1;
  return 0;
}
int cuTensorMapEncodeTiled() { return 0; }
int cuStreamWriteValue32() { return 0; }
int cuModuleLoad(void **m, const char *f) {
  *m = (void *)1;
  return 0;
}
int cuModuleLoadDataEx(void **m, const void *i) {
  *m = (void *)1;
  return 0;
}
int cuLibraryLoadData(void **m) {
  *m = (void *)1;
  return 0;
}
int cuStreamGetCtx(void *s, void **c) {
  *c = (void *)1;
  return 0;
}
int cuPointerGetAttributes() { return 0; }
int cuModuleGetGlobal() { return 0; }
int cuDeviceGetName(char *b, int k, int d) {
  strncpy(b, "null", k);
  return 0;
}
